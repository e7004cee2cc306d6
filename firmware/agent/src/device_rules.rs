//! The device rules of the runtime specification as a program (eBPF) on the
//! container's cgroup, which is how the kernel enforces them with cgroup v2. A
//! container may make device nodes; without this it could open the disk of
//! another.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::Error;

/// An instruction of eBPF: code, source and destination register, offset, immediate.
type Instruction = (u8, u8, i16, i32);

// Of linux/bpf_common.h and linux/bpf.h.
const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbf;
const MOVE: u8 = 0xb7;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
const JUMP_IF_EQUAL: u8 = 0x15;
const EXIT: u8 = 0x95;
const PROGRAM_LOAD: libc::c_int = 5;
const PROGRAM_ATTACH: libc::c_int = 8;
const OF_CGROUP_DEVICE: u32 = 15;
const AT_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTIPLE: u32 = 2;

// Of struct bpf_cgroup_dev_ctx: type and access in one word, major, minor.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

/// The most rules of a container.
const RULES: usize = 512;

/// One rule: nothing for a wildcard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

impl Rule {
    fn speaks_of_all(&self) -> bool {
        self.kind.is_none()
            && self.major.is_none()
            && self.minor.is_none()
            && self.access == MKNOD | READ | WRITE
    }
}

/// What every container may use, as with other runtimes: nodes of any device may be made, but only these used.
const ALWAYS: [Rule; 10] = [
    Rule {
        allow: true,
        kind: None,
        major: None,
        minor: None,
        access: MKNOD,
    },
    usable(1, Some(3)),
    usable(1, Some(5)),
    usable(1, Some(7)),
    usable(1, Some(8)),
    usable(1, Some(9)),
    usable(5, Some(0)),
    usable(5, Some(1)),
    usable(5, Some(2)),
    usable(136, None),
];

const fn usable(major: i32, minor: Option<i32>) -> Rule {
    Rule {
        allow: true,
        kind: Some(CHARACTER),
        major: Some(major),
        minor,
        access: MKNOD | READ | WRITE,
    }
}

/// A program that decides by the rules: the last that speaks of an access holds, and what none speaks of is
/// refused. Nothing if there are no rules.
pub struct Program(Vec<Instruction>);

/// Compiles the rules of a specification.
///
/// # Errors
/// `InvalidArgument` for too many of them, or numbers and letters that are none.
pub fn compile(rules: &[LinuxDeviceCgroup]) -> Result<Option<Program>, Error> {
    if rules.is_empty() {
        return Ok(None);
    }
    if rules.len() > RULES {
        return Err(invalid(format!(
            "are {}: {RULES} are possible",
            rules.len()
        )));
    }
    let mut all = rules.iter().map(parsed).collect::<Result<Vec<_>, _>>()?;
    all.extend(ALWAYS);
    // r2: type, r3: access, r4: major, r5: minor.
    let mut program = vec![
        (LOAD_WORD, 0x12, 0, 0),
        (MOVE_REGISTER, 0x23, 0, 0),
        (AND, 0x02, 0, 0xffff),
        (SHIFT_RIGHT, 0x03, 0, 16),
        (LOAD_WORD, 0x14, 4, 0),
        (LOAD_WORD, 0x15, 8, 0),
    ];
    // The last rule first, since the first that fits decides.
    for rule in all.iter().rev() {
        program.extend(block(rule));
        if rule.speaks_of_all() {
            // The kernel takes no program with instructions that cannot be reached.
            return Ok(Some(Program(program)));
        }
    }
    program.extend(verdict(false));
    Ok(Some(Program(program)))
}

impl Program {
    /// Puts the program on a cgroup, whose directory is open; it goes with the cgroup.
    ///
    /// # Errors
    /// What the kernel said; `ENOSYS` or `EINVAL` if it was built without this.
    pub fn attach(&self, cgroup: RawFd) -> io::Result<()> {
        let code: Vec<u8> = self.0.iter().flat_map(encoded).collect();
        let license = c"Apache-2.0";
        let load = LoadAttributes {
            kind: OF_CGROUP_DEVICE,
            count: self.0.len() as u32,
            code: code.as_ptr() as u64,
            license: license.as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the kernel reads the attributes, the code and the license by their lengths; all live until
        // the call returns.
        let program = unsafe { bpf(PROGRAM_LOAD, &load) }?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
        let program = unsafe { OwnedFd::from_raw_fd(program) };
        let attach = AttachAttributes {
            target: cgroup as u32,
            program: program.as_raw_fd() as u32,
            kind: AT_CGROUP_DEVICE,
            flags: ALLOW_MULTIPLE,
        };
        // SAFETY: the kernel reads the attributes, which live until the call returns.
        unsafe { bpf(PROGRAM_ATTACH, &attach) }.map(|_| ())
    }
}

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`; the kernel takes the rest as zeros.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The same for `BPF_PROG_ATTACH`.
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// # Safety
/// The attributes must be those of the command, and what they point to must live.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: by the contract of this function.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match result {
        0.. => Ok(result as RawFd),
        _ => Err(io::Error::last_os_error()),
    }
}

fn encoded(&(code, registers, offset, immediate): &Instruction) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[0] = code;
    bytes[1] = registers;
    bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
    bytes[4..8].copy_from_slice(&immediate.to_ne_bytes());
    bytes
}

fn verdict(allow: bool) -> [Instruction; 2] {
    [(MOVE, 0, 0, i32::from(allow)), (EXIT, 0, 0, 0)]
}

/// Decides if the rule fits, and else goes on after it. A permission fits if it holds all that is wanted, a
/// refusal if it holds any of it.
fn block(rule: &Rule) -> Vec<Instruction> {
    let mut checks = Vec::new();
    for (register, wanted) in [(2, rule.kind), (4, rule.major), (5, rule.minor)] {
        if let Some(wanted) = wanted {
            checks.push((JUMP_IF_NOT_EQUAL, register, 0, wanted));
        }
    }
    if rule.access != MKNOD | READ | WRITE {
        let others = !rule.access & (MKNOD | READ | WRITE);
        checks.push((MOVE_REGISTER, 0x31, 0, 0));
        checks.push(match rule.allow {
            true => (AND, 0x01, 0, others),
            false => (AND, 0x01, 0, rule.access),
        });
        checks.push(match rule.allow {
            true => (JUMP_IF_NOT_EQUAL, 0x01, 0, 0),
            false => (JUMP_IF_EQUAL, 0x01, 0, 0),
        });
    }
    let length = checks.len() + 2;
    for (number, check) in checks.iter_mut().enumerate() {
        if matches!(check.0, JUMP_IF_NOT_EQUAL | JUMP_IF_EQUAL) {
            check.2 = (length - number - 1) as i16;
        }
    }
    checks.extend(verdict(rule.allow));
    checks
}

fn parsed(rule: &LinuxDeviceCgroup) -> Result<Rule, Error> {
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
        Some(LinuxDeviceType::P) => return Err(invalid("name a pipe".into())),
    };
    let number = |number: Option<i64>| match number {
        None | Some(..0) => Ok(None),
        Some(number) => i32::try_from(number)
            .map(Some)
            .map_err(|_| invalid(format!("name the device number {number}"))),
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            other => {
                return Err(invalid(format!(
                    "have the access `{}`",
                    other.escape_debug()
                )));
            }
        };
    }
    Ok(Rule {
        allow: rule.allow(),
        kind,
        major: number(rule.major())?,
        minor: number(rule.minor())?,
        access,
    })
}

fn invalid(what: String) -> Error {
    Error::InvalidArgument(format!("the device rules {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would answer.
    fn run(program: &Program, kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0_i64; 11];
        let mut at = 0_usize;
        loop {
            let (code, both, offset, immediate) = program.0[at];
            let (to, from) = (usize::from(both & 15), usize::from(both >> 4));
            at += 1;
            match code {
                LOAD_WORD => {
                    assert_eq!(from, 1, "loads come from the context");
                    registers[to] = match offset {
                        0 => i64::from(access << 16 | kind),
                        4 => i64::from(major),
                        8 => i64::from(minor),
                        other => panic!("a load at {other}"),
                    };
                }
                MOVE_REGISTER => registers[to] = registers[from],
                MOVE => registers[to] = i64::from(immediate),
                AND => registers[to] &= i64::from(immediate),
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP_IF_NOT_EQUAL if registers[to] != i64::from(immediate) => at += offset as usize,
                JUMP_IF_EQUAL if registers[to] == i64::from(immediate) => at += offset as usize,
                JUMP_IF_NOT_EQUAL | JUMP_IF_EQUAL => {}
                EXIT => return registers[0] == 1,
                other => panic!("code {other:#x}"),
            }
        }
    }

    fn program(json: &str) -> Program {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        compile(&rules).unwrap().unwrap()
    }

    #[test]
    fn all_is_refused_but_what_everyone_may() {
        let program = program(r#"[{"allow":false,"access":"rwm"}]"#);
        for (major, minor) in [(1, 3), (1, 5), (1, 8), (5, 0), (136, 9)] {
            assert!(run(&program, CHARACTER, READ | WRITE, major, minor));
        }
        assert!(run(&program, BLOCK, MKNOD, 254, 0), "nodes may be made");
        assert!(!run(&program, BLOCK, READ, 254, 0), "but not opened");
        assert!(
            !run(&program, BLOCK, MKNOD | READ, 1, 3),
            "a block device of these numbers"
        );
        assert!(!run(&program, CHARACTER, READ, 1, 1), "memory");
    }

    #[test]
    fn the_last_rule_that_speaks_of_it_holds() {
        let program = program(
            r#"[{"allow":false,"access":"rwm"},
            {"allow":true,"type":"b","major":8,"access":"rw"},
            {"allow":false,"type":"b","major":8,"minor":1,"access":"w"},
            {"allow":true,"type":"c","major":10,"minor":-1,"access":"r"}]"#,
        );
        let table = [
            (BLOCK, READ | WRITE, 8, 0, true),
            (BLOCK, READ, 8, 1, true),
            (BLOCK, WRITE, 8, 1, false),
            (BLOCK, READ | WRITE, 8, 1, false),
            (BLOCK, READ, 9, 0, false),
            (CHARACTER, READ, 10, 200, true),
            (CHARACTER, READ | WRITE, 10, 200, false),
        ];
        for (kind, access, major, minor, expected) in table {
            let got = run(&program, kind, access, major, minor);
            assert_eq!(got, expected, "{kind} {access} {major}:{minor}");
        }
    }

    #[test]
    fn everything_can_be_allowed_and_no_rules_are_none() {
        let open = program(r#"[{"allow":true,"type":"b"},{"allow":true,"access":"rwm"}]"#);
        assert_eq!(open.0.last(), Some(&(EXIT, 0, 0, 0)));
        let exits = open.0.iter().filter(|instruction| instruction.0 == EXIT);
        assert_eq!(exits.count(), ALWAYS.len() + 1, "nothing after the last");
        assert!(run(&open, BLOCK, READ | WRITE | MKNOD, 8, 0));
        assert!(compile(&[]).unwrap().is_none());
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for json in [
            r#"[{"allow":true,"access":"rx"}]"#,
            r#"[{"allow":true,"type":"p"}]"#,
            r#"[{"allow":true,"major":4294967296}]"#,
        ] {
            let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
            assert!(compile(&rules).is_err(), "{json}");
        }
    }
}
