//! The kernel's ELF file without what a VMM has no use for: zeros at the ends of segments, which fresh memory has by itself, and
//! all that is in no segment.

use elf::ElfBytes;
use elf::abi::PT_LOAD;
use elf::endian::LittleEndian;
use elf::file::Class;

/// Where the ELF header of a 64-bit file has the section table's offset, and the sizes that end it.
const SECTIONS_OFFSET: std::ops::Range<usize> = 40..48;
const SECTIONS_COUNT: std::ops::Range<usize> = 58..64;

/// Where a program header has the bytes that are in the file.
const FILE_SIZE: usize = 32;

/// Cuts the file. What is no 64-bit ELF file, or a broken one, stays as it is: who loads it says why it cannot.
pub(crate) fn trim(vmlinux: &mut Vec<u8>) {
    let Some(Cut { sizes, end }) = cut(vmlinux) else {
        return;
    };
    for (at, size) in sizes {
        vmlinux[at..at + 8].copy_from_slice(&size.to_le_bytes());
    }
    vmlinux[SECTIONS_OFFSET].fill(0);
    vmlinux[SECTIONS_COUNT].fill(0);
    vmlinux.truncate(end);
}

/// What is to be cut.
struct Cut {
    /// Where file sizes of segments are, and what they become.
    sizes: Vec<(usize, u64)>,
    /// Where the file ends.
    end: usize,
}

fn cut(vmlinux: &[u8]) -> Option<Cut> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(vmlinux).ok()?;
    let header = &file.ehdr;
    let segments = file.segments()?;
    let entry = usize::from(header.e_phentsize);
    let table = usize::try_from(header.e_phoff).ok()?;
    // The parser has looked at the table's entries.
    let mut end = table + segments.len() * entry;
    let mut sizes = Vec::new();
    for (number, segment) in segments.iter().enumerate() {
        let start = usize::try_from(segment.p_offset).ok()?;
        let length = usize::try_from(segment.p_filesz).ok()?;
        let content = vmlinux.get(start..start.checked_add(length)?)?;
        let used = match segment.p_type {
            PT_LOAD => content
                .iter()
                .rposition(|&byte| byte != 0)
                // One byte stays, since loaders take a segment without any for nothing at all.
                .map_or(length.min(1), |last| last + 1),
            _ => length,
        };
        sizes.push((table + number * entry + FILE_SIZE, used as u64));
        end = end.max(start + used);
    }
    (header.class == Class::ELF64 && !sizes.is_empty()).then_some(Cut { sizes, end })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file of segments (kind, content), and something behind them.
    fn file(segments: &[(u32, &[u8])]) -> Vec<u8> {
        let mut file = vec![0; 64];
        file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        file[16] = 2;
        file[18] = 62;
        file[20] = 1;
        file[32] = 64;
        file[52] = 64;
        file[54] = 56;
        file[56] = segments.len() as u8;
        let mut offset = 64 + 56 * segments.len() as u64;
        for (kind, content) in segments {
            file.extend_from_slice(&kind.to_le_bytes());
            file.extend_from_slice(&[0; 4]);
            let size = content.len() as u64;
            for value in [offset, 0, 0, size, size + 1, 1] {
                file.extend_from_slice(&value.to_le_bytes());
            }
            offset += size;
        }
        for (_, content) in segments {
            file.extend_from_slice(content);
        }
        file.extend_from_slice(b"symbols");
        file
    }

    fn contents(file: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let file = ElfBytes::<LittleEndian>::minimal_parse(file).expect("an ELF file");
        let segments = file.segments().expect("segments");
        let content = |segment| file.segment_data(&segment).expect("content").to_vec();
        segments
            .iter()
            .map(|segment| (segment.p_memsz, content(segment)))
            .collect()
    }

    #[test]
    fn zeros_at_the_ends_of_segments_and_what_is_behind_them_go() {
        let mut vmlinux = file(&[
            (PT_LOAD, b"text\0\0"),
            (4, b"\0\0"),
            (PT_LOAD, b"d\0ta\0\0\0"),
        ]);
        let before = vmlinux.len();
        trim(&mut vmlinux);
        // The zeros within the file stay where they are, since nothing moves.
        assert_eq!(vmlinux.len(), before - b"symbols".len() - 3);
        assert_eq!(
            contents(&vmlinux),
            [
                (7, b"text".to_vec()),
                (3, b"\0\0".to_vec()),
                (8, b"d\0ta".to_vec())
            ]
        );
        let mut zeros = file(&[(PT_LOAD, b"text"), (PT_LOAD, b"\0\0\0")]);
        trim(&mut zeros);
        assert_eq!(contents(&zeros)[1], (4, b"\0".to_vec()));
        let once = vmlinux.clone();
        trim(&mut vmlinux);
        assert_eq!(vmlinux, once);
    }

    #[test]
    fn what_is_broken_stays_as_it_is() {
        let whole = file(&[(PT_LOAD, b"text\0")]);
        let mut beyond = whole.clone();
        beyond[64 + FILE_SIZE..64 + FILE_SIZE + 8].fill(0xff);
        let mut narrow = whole.clone();
        narrow[4] = 1;
        for broken in [
            beyond,
            narrow,
            whole[..80].to_vec(),
            b"no ELF".to_vec(),
            Vec::new(),
        ] {
            let mut trimmed = broken.clone();
            trim(&mut trimmed);
            assert_eq!(trimmed, broken);
        }
    }
}
