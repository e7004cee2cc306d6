//! Unpacks the payload of a bzImage to the ELF `vmlinux` in it, on the host.
//!
//! A pure function over bytes: it reads the setup header (Linux x86 boot
//! protocol, 2.08 or later, for `payload_offset` and `payload_length`), tells
//! the compression by its magic and unpacks with an upper bound on the output.
//! Loading the result into guest memory is not done here.

use std::io::Read;

use thiserror::Error;

/// The largest `vmlinux` that is unpacked by [`unpack_bzimage`]: 1 GiB.
pub const MAX_VMLINUX: usize = 1 << 30;

/// Memory that the xz decoder may take: a 128 MiB dictionary and some room.
const XZ_MEMORY_LIMIT: u64 = 192 << 20;
/// An LZ4 legacy frame has blocks of at most 8 MiB when unpacked.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL_VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The end of the last header field that is read here.
const HEADER_END: usize = 0x250;
const SECTOR: usize = 512;
/// The first protocol version with `payload_offset` and `payload_length`.
const MIN_PROTOCOL: u16 = 0x0208;

const ELF_MAGIC: &[u8] = b"\x7fELF";

/// Why a bzImage's payload could not be unpacked.
#[derive(Debug, Error)]
pub enum PayloadError {
    /// There is no setup header with `HdrS` at 0x202.
    #[error("not a bzImage: no setup header with the magic \"HdrS\" at offset 0x202")]
    NotBzImage,
    /// The boot protocol is older than 2.08.
    #[error(
        "the bzImage has boot protocol {major}.{minor:02}; 2.08 or later is needed to find its payload"
    )]
    OldProtocol {
        /// Major version of the image's boot protocol.
        major: u8,
        /// Minor version of the image's boot protocol.
        minor: u8,
    },
    /// The header names a payload that is not within the file.
    #[error(
        "the bzImage's payload (offset {offset}, {length} bytes) is not within its {file} bytes"
    )]
    OutOfFile {
        /// First byte of the payload in the file.
        offset: u64,
        /// Length of the payload by the header.
        length: u64,
        /// Length of the file.
        file: usize,
    },
    /// A compression that Linux offers and that is not unpacked here.
    #[error(
        "the bzImage's payload is packed with {0}, which is not supported; gzip, LZ4, xz and zstd are"
    )]
    Unsupported(&'static str),
    /// No compression that is known.
    #[error("the bzImage's payload begins with {0:02x?}, which no known compression does")]
    Unknown(Vec<u8>),
    /// The decoder found the payload broken.
    #[error("unpacking the bzImage's {compression} payload")]
    Broken {
        /// The compression, by its magic.
        compression: Compression,
        /// What the decoder says.
        #[source]
        source: std::io::Error,
    },
    /// The output would be larger than the bound.
    #[error("the bzImage's {compression} payload unpacks to more than {limit} bytes")]
    TooLarge {
        /// The compression, by its magic.
        compression: Compression,
        /// The bound, in bytes.
        limit: usize,
    },
    /// The size that the kernel's build wrote behind the payload is not the output's.
    #[error(
        "the bzImage's {compression} payload unpacks to {got} bytes; its trailer says {expected}"
    )]
    WrongSize {
        /// The compression, by its magic.
        compression: Compression,
        /// The size in the trailer.
        expected: u32,
        /// The size of the output.
        got: usize,
    },
    /// The payload is something else than an ELF file.
    #[error("the bzImage's payload is not an ELF file")]
    NotElf,
}

/// How a bzImage's payload is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// gzip (RFC 1952); its own trailer has the size.
    Gzip,
    /// The legacy frame of LZ4, magic 0x184C2102.
    Lz4,
    /// xz, usually with the x86 branch filter and CRC32.
    Xz,
    /// Zstandard (RFC 8878).
    Zstd,
    /// Nothing: the ELF file lies there as it is.
    None,
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Compression::Gzip => "gzip",
            Compression::Lz4 => "LZ4",
            Compression::Xz => "xz",
            Compression::Zstd => "zstd",
            Compression::None => "unpacked",
        })
    }
}

impl Compression {
    /// Tells the compression of a payload by its first bytes.
    ///
    /// # Errors
    ///
    /// [`PayloadError::Unsupported`] for bzip2, LZMA and LZO, and
    /// [`PayloadError::Unknown`] for anything else.
    pub fn of(payload: &[u8]) -> Result<Self, PayloadError> {
        const MAGICS: [(&[u8], Result<Compression, &str>); 9] = [
            (&[0x1f, 0x8b], Ok(Compression::Gzip)),
            (&[0x1f, 0x9e], Ok(Compression::Gzip)),
            (&[0x02, 0x21, 0x4c, 0x18], Ok(Compression::Lz4)),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Ok(Compression::Xz)),
            (&[0x28, 0xb5, 0x2f, 0xfd], Ok(Compression::Zstd)),
            (ELF_MAGIC, Ok(Compression::None)),
            (b"BZh", Err("bzip2")),
            (&[0x5d, 0, 0], Err("LZMA")),
            (&[0x89, b'L', b'Z', b'O'], Err("LZO")),
        ];
        for (magic, compression) in MAGICS {
            if payload.starts_with(magic) {
                return compression.map_err(PayloadError::Unsupported);
            }
        }
        Err(PayloadError::Unknown(
            payload.iter().take(6).copied().collect(),
        ))
    }
}

/// Whether the file has a bzImage's setup header (an ELF kernel has not).
pub fn is_bzimage(file: &[u8]) -> bool {
    file.len() >= HEADER_END
        && file[BOOT_FLAG..BOOT_FLAG + 2] == [0x55, 0xaa]
        && &file[HEADER_MAGIC..HEADER_MAGIC + 4] == b"HdrS"
}

/// The kernel's version text of a bzImage: the release, then who built it and
/// when. `None` where the header names none.
pub fn bzimage_version(file: &[u8]) -> Option<String> {
    if !is_bzimage(file) {
        return None;
    }
    let pointer = usize::from(u16_at(file, KERNEL_VERSION));
    if pointer == 0 {
        return None;
    }
    let text = file.get(pointer + SECTOR..)?;
    let text = &text[..text.len().min(256)];
    let end = text.iter().position(|&byte| byte == 0)?;
    Some(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// The packed payload within a bzImage, with its size trailer.
///
/// # Errors
///
/// If the file is no bzImage, its protocol is older than 2.08, or the header's
/// numbers lead out of the file.
pub fn packed_payload(file: &[u8]) -> Result<&[u8], PayloadError> {
    if !is_bzimage(file) {
        return Err(PayloadError::NotBzImage);
    }
    let protocol = u16_at(file, PROTOCOL_VERSION);
    if protocol < MIN_PROTOCOL {
        let [major, minor] = protocol.to_be_bytes();
        return Err(PayloadError::OldProtocol { major, minor });
    }
    // Zero means four, for the sake of very old loaders.
    let setup_sectors = match file[SETUP_SECTS] {
        0 => 4,
        n => usize::from(n),
    };
    let offset = ((setup_sectors + 1) * SECTOR) as u64 + u64::from(u32_at(file, PAYLOAD_OFFSET));
    let length = u64::from(u32_at(file, PAYLOAD_LENGTH));
    let out_of_file = || PayloadError::OutOfFile {
        offset,
        length,
        file: file.len(),
    };
    let start = usize::try_from(offset).map_err(|_| out_of_file())?;
    let end = usize::try_from(offset + length).map_err(|_| out_of_file())?;
    if start == end {
        return Err(out_of_file());
    }
    file.get(start..end).ok_or_else(out_of_file)
}

/// Unpacks a bzImage's payload: the ELF `vmlinux`, of at most [`MAX_VMLINUX`] bytes.
///
/// # Errors
///
/// See [`PayloadError`].
///
/// ```
/// # use nacre_vmm::boot::payload::{PayloadError, unpack_bzimage};
/// assert!(matches!(unpack_bzimage(b"MZ"), Err(PayloadError::NotBzImage)));
/// ```
pub fn unpack_bzimage(file: &[u8]) -> Result<Vec<u8>, PayloadError> {
    unpack_bounded(file, MAX_VMLINUX)
}

/// [`unpack_bzimage`] with another bound on the output, in bytes.
///
/// # Errors
///
/// See [`PayloadError`].
pub fn unpack_bounded(file: &[u8], limit: usize) -> Result<Vec<u8>, PayloadError> {
    let payload = packed_payload(file)?;
    let compression = Compression::of(payload)?;
    let output = match compression {
        Compression::None => read_bounded(payload, compression, limit)?,
        Compression::Gzip => {
            read_bounded(flate2::bufread::GzDecoder::new(payload), compression, limit)?
        }
        Compression::Lz4 => unpack_lz4_legacy(payload, limit)?,
        Compression::Xz => {
            // Not the concatenating decoder: the size trailer is no second stream.
            let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_LIMIT, 0)
                .map_err(|error| broken(compression, std::io::Error::from(error)))?;
            let decoder = liblzma::bufread::XzDecoder::new_stream(payload, stream);
            read_bounded(decoder, compression, limit)?
        }
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(payload)
                .map_err(|source| broken(compression, source))?
                .single_frame();
            read_bounded(decoder, compression, limit)?
        }
    };
    // The kernel's build puts the size behind every payload but gzip's, which has it already.
    if matches!(
        compression,
        Compression::Lz4 | Compression::Xz | Compression::Zstd
    ) {
        let expected = u32_at(payload, payload.len() - 4);
        if expected as usize != output.len() {
            return Err(PayloadError::WrongSize {
                compression,
                expected,
                got: output.len(),
            });
        }
    }
    if !output.starts_with(ELF_MAGIC) {
        return Err(PayloadError::NotElf);
    }
    Ok(output)
}

/// Reads to the end, and fails rather than hold more than `limit` bytes.
fn read_bounded(
    reader: impl Read,
    compression: Compression,
    limit: usize,
) -> Result<Vec<u8>, PayloadError> {
    let mut output = Vec::new();
    reader
        .take(limit as u64 + 1)
        .read_to_end(&mut output)
        .map_err(|source| broken(compression, source))?;
    if output.len() > limit {
        return Err(PayloadError::TooLarge { compression, limit });
    }
    Ok(output)
}

/// Unpacks an LZ4 legacy frame: the magic, then blocks, each with its packed
/// size before it, until the payload's last four bytes.
fn unpack_lz4_legacy(payload: &[u8], limit: usize) -> Result<Vec<u8>, PayloadError> {
    let compression = Compression::Lz4;
    let invalid = |text: String| {
        broken(
            compression,
            std::io::Error::new(std::io::ErrorKind::InvalidData, text),
        )
    };
    let mut output = Vec::new();
    let mut block = vec![0; LZ4_LEGACY_BLOCK.min(limit.saturating_add(1))];
    let end = payload.len().saturating_sub(4);
    let mut position = 4;
    while position < end {
        let Some(size) = payload
            .get(position..position + 4)
            .filter(|_| position + 4 <= end)
        else {
            return Err(invalid(format!("a block's size at {position} is cut off")));
        };
        let size = u32_at(size, 0) as usize;
        position += 4;
        let Some(packed) = payload.get(position..end).and_then(|rest| rest.get(..size)) else {
            return Err(invalid(format!(
                "a block of {size} bytes at {position} is cut off"
            )));
        };
        position += size;
        let length = match lz4_flex::block::decompress_into(packed, &mut block) {
            Ok(length) => length,
            Err(lz4_flex::block::DecompressError::OutputTooSmall { .. })
                if block.len() < LZ4_LEGACY_BLOCK =>
            {
                return Err(PayloadError::TooLarge { compression, limit });
            }
            Err(error) => return Err(invalid(error.to_string())),
        };
        if output.len() + length > limit {
            return Err(PayloadError::TooLarge { compression, limit });
        }
        output.extend_from_slice(&block[..length]);
    }
    Ok(output)
}

fn broken(compression: Compression, source: std::io::Error) -> PayloadError {
    PayloadError::Broken {
        compression,
        source,
    }
}

/// The little-endian number at `offset`; the caller knows that it is there.
fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

/// The little-endian number at `offset`; the caller knows that it is there.
fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes([
        bytes[offset],
        bytes[offset + 1],
        bytes[offset + 2],
        bytes[offset + 3],
    ])
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Something that packs, does not repeat too soon, and begins like an ELF file.
    fn made_up_elf(length: usize) -> Vec<u8> {
        let mut elf = ELF_MAGIC.to_vec();
        let mut state = 1u32;
        while elf.len() < length {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            elf.extend_from_slice(&(state >> 28).to_le_bytes());
        }
        elf.truncate(length);
        elf
    }

    /// A bzImage whose payload is `payload`, with one sector of setup and some code before it.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 2 * SECTOR + 16];
        file[SETUP_SECTS] = 1;
        file[BOOT_FLAG..BOOT_FLAG + 2].copy_from_slice(&[0x55, 0xaa]);
        file[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        file[PROTOCOL_VERSION..PROTOCOL_VERSION + 2].copy_from_slice(&0x020fu16.to_le_bytes());
        file[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        let length = u32::try_from(payload.len()).expect("a small payload");
        file[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        file.extend_from_slice(payload);
        file.extend_from_slice(b"what follows the payload is not read");
        file
    }

    fn with_size(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
        packed.extend_from_slice(&u32::try_from(size).expect("a small size").to_le_bytes());
        packed
    }

    fn gzip(elf: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(elf).expect("in memory");
        encoder.finish().expect("in memory")
    }

    fn lz4(elf: &[u8]) -> Vec<u8> {
        let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
        for block in elf.chunks(LZ4_LEGACY_BLOCK) {
            let block = lz4_flex::block::compress(block);
            packed.extend_from_slice(&u32::try_from(block.len()).expect("8 MiB").to_le_bytes());
            packed.extend_from_slice(&block);
        }
        with_size(packed, elf.len())
    }

    fn xz(elf: &[u8]) -> Vec<u8> {
        use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
        let mut filters = Filters::new();
        filters.x86();
        filters.lzma2(&LzmaOptions::new_preset(6).expect("a preset"));
        let stream = Stream::new_stream_encoder(&filters, Check::Crc32).expect("an encoder");
        let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        encoder.write_all(elf).expect("in memory");
        with_size(encoder.finish().expect("in memory"), elf.len())
    }

    fn zstd(elf: &[u8]) -> Vec<u8> {
        with_size(zstd::encode_all(elf, 3).expect("in memory"), elf.len())
    }

    type Packer = fn(&[u8]) -> Vec<u8>;
    const PACKERS: [(Compression, Packer); 4] = [
        (Compression::Gzip, gzip),
        (Compression::Lz4, lz4),
        (Compression::Xz, xz),
        (Compression::Zstd, zstd),
    ];

    #[test]
    fn each_compression_unpacks_to_what_was_packed() {
        let elf = made_up_elf(200_000);
        for (compression, pack) in PACKERS {
            let file = bzimage(&pack(&elf));
            let payload = packed_payload(&file).expect("a payload");
            assert_eq!(
                Compression::of(payload).expect("a compression"),
                compression
            );
            assert!(
                unpack_bzimage(&file).expect("unpacks") == elf,
                "{compression}"
            );
        }
        assert!(unpack_bzimage(&bzimage(&elf)).expect("an ELF file as it is") == elf);
    }

    #[test]
    fn an_lz4_frame_of_several_blocks_unpacks() {
        let elf = made_up_elf(LZ4_LEGACY_BLOCK + 12_345);
        assert!(unpack_bzimage(&bzimage(&lz4(&elf))).expect("two blocks") == elf);
    }

    #[test]
    fn output_beyond_the_bound_is_refused() {
        let elf = made_up_elf(100_000);
        for (compression, pack) in PACKERS {
            let file = bzimage(&pack(&elf));
            assert!(unpack_bounded(&file, elf.len()).is_ok(), "{compression}");
            for limit in [elf.len() - 1, 1] {
                let error = unpack_bounded(&file, limit).expect_err("too large");
                assert!(
                    matches!(error, PayloadError::TooLarge { .. }),
                    "{compression}: {error:?}"
                );
            }
        }
    }

    #[test]
    fn broken_payloads_are_errors() {
        let elf = made_up_elf(100_000);
        for (compression, pack) in PACKERS {
            let packed = pack(&elf);
            // Cut off at every length that leaves the magic, in steps.
            for length in (8..packed.len()).step_by(packed.len() / 40) {
                assert!(
                    unpack_bzimage(&bzimage(&packed[..length])).is_err(),
                    "{compression} {length}"
                );
            }
        }
    }

    #[test]
    fn a_wrong_size_trailer_is_refused() {
        for (compression, pack) in PACKERS {
            let mut packed = pack(&made_up_elf(1000));
            let last = packed.len() - 4;
            packed[last] ^= 1;
            let error = unpack_bzimage(&bzimage(&packed)).expect_err("a wrong size");
            match compression {
                Compression::Gzip => {
                    assert!(matches!(error, PayloadError::Broken { .. }), "{error:?}");
                }
                _ => assert!(matches!(error, PayloadError::WrongSize { .. }), "{error:?}"),
            }
        }
    }

    #[test]
    fn a_payload_that_is_no_elf_is_refused() {
        for (compression, pack) in PACKERS {
            let error = unpack_bzimage(&bzimage(&pack(b"no kernel"))).expect_err("no ELF");
            assert!(
                matches!(error, PayloadError::NotElf),
                "{compression}: {error:?}"
            );
        }
    }

    #[test]
    fn unsupported_compressions_are_named() {
        for (payload, name) in [
            (&b"BZh91AY"[..], "bzip2"),
            (&[0x5d, 0, 0, 0x80, 0][..], "LZMA"),
            (b"\x89LZO\0\r\n", "LZO"),
        ] {
            let error = unpack_bzimage(&bzimage(payload)).expect_err("unsupported");
            assert!(error.to_string().contains(name), "{error}");
        }
        let error = unpack_bzimage(&bzimage(b"what is this")).expect_err("unknown");
        assert!(matches!(error, PayloadError::Unknown(_)), "{error:?}");
    }

    #[test]
    fn header_faults_are_told_apart() {
        let good = bzimage(&gzip(&made_up_elf(1000)));
        let fault = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut file = good.clone();
            change(&mut file);
            unpack_bzimage(&file).expect_err("a fault")
        };
        assert!(matches!(
            fault(&|file| file[HEADER_MAGIC] = b'h'),
            PayloadError::NotBzImage
        ));
        assert!(matches!(
            fault(&|file| file.truncate(HEADER_END - 1)),
            PayloadError::NotBzImage
        ));
        assert!(matches!(
            fault(&|file| file[PROTOCOL_VERSION] = 7),
            PayloadError::OldProtocol { major: 2, minor: 7 }
        ));
        for field in [PAYLOAD_OFFSET, PAYLOAD_LENGTH] {
            let error = fault(&|file| file[field..field + 4].fill(0xff));
            assert!(matches!(error, PayloadError::OutOfFile { .. }), "{error:?}");
        }
        let error = fault(&|file| file[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].fill(0));
        assert!(
            matches!(error, PayloadError::OutOfFile { length: 0, .. }),
            "{error:?}"
        );
        assert!(matches!(
            fault(&|file| file.truncate(2 * SECTOR)),
            PayloadError::OutOfFile { .. }
        ));
    }

    #[test]
    fn the_version_text_is_read_where_the_header_points() {
        let mut file = bzimage(b"x");
        assert_eq!(bzimage_version(&file), None);
        file[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&0x100u16.to_le_bytes());
        file[0x300..0x30c].copy_from_slice(b"6.1.0 (me)\0#");
        assert_eq!(bzimage_version(&file).as_deref(), Some("6.1.0 (me)"));
        file[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&0xffffu16.to_le_bytes());
        assert_eq!(bzimage_version(&file), None);
    }
}
