//! Seccomp profiles of the runtime specification as classic BPF programs, and
//! their installation. A profile has many actions, so that it is compiled here,
//! call by call, instead of by a library whose filters know two of them.
//!
//! Two architectures are known: the guest's own, and 32-bit x86 if the profile
//! names it. Calls by any other are killed, and x32 ones answered with ENOSYS,
//! since the guests' kernels do not have it.

use std::collections::BTreeMap;
use std::io;
use std::str::FromStr;

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// A compiled profile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Of `seccomp(2)`.
    flags: u32,
    program: Vec<Instruction>,
}

/// An instruction of classic BPF: code, jump if true, jump if false, operand.
type Instruction = (u16, u8, u8, u32);

/// The kernel takes no longer programs.
const INSTRUCTIONS: usize = 4096;

// Of linux/bpf_common.h, linux/audit.h and linux/seccomp.h.
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const EQUAL: u16 = 0x15;
const GREATER: u16 = 0x25;
const GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;
const NATIVE: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const X32_BIT: u32 = 0x4000_0000;
const AT_NUMBER: u32 = 0;
const AT_ARCHITECTURE: u32 = 4;
const AT_ARGUMENTS: u32 = 16;
const KILL_PROCESS: u32 = 0x8000_0000;
const NO_SUCH_CALL: u32 = 0x0005_0000 | libc::ENOSYS as u32;

/// Compiles a profile. Names of calls that an architecture does not have are left out, as in other runtimes.
///
/// # Errors
/// `InvalidArgument` for what the guest cannot do (to notify another process), or what no kernel takes.
pub fn compile(profile: &LinuxSeccomp) -> Result<Filter, Error> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let architectures = profile.architectures().as_deref().unwrap_or(&[]);
    let of_32_bit = architectures.contains(&Arch::ScmpArchX86);
    let rules = profile.syscalls().as_deref().unwrap_or(&[]);

    let native = section(rules, default, |name| {
        let number = syscalls::x86_64::Sysno::from_str(name).ok()?;
        u32::try_from(number.id()).ok()
    })?;
    let other = match of_32_bit {
        true => section(rules, default, |name| {
            let number = syscalls::x86::Sysno::from_str(name).ok()?;
            u32::try_from(number.id()).ok()
        })?,
        false => vec![(RETURN, 0, 0, KILL_PROCESS)],
    };
    let mut program = vec![
        (LOAD, 0, 0, AT_ARCHITECTURE),
        (EQUAL, 1, 0, NATIVE),
        // Over the native section and the three lines before it.
        (JUMP, 0, 0, native.len() as u32 + 3),
        (LOAD, 0, 0, AT_NUMBER),
        (GREATER_OR_EQUAL, 0, 1, X32_BIT),
        (RETURN, 0, 0, NO_SUCH_CALL),
    ];
    program.extend(native);
    program.extend([(EQUAL, 1, 0, I386), (RETURN, 0, 0, KILL_PROCESS)]);
    program.push((LOAD, 0, 0, AT_NUMBER));
    program.extend(other);
    if program.len() > INSTRUCTIONS {
        return Err(invalid(format!(
            "has {} instructions, of which the kernel takes {INSTRUCTIONS}",
            program.len()
        )));
    }
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => flags |= 2,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => flags |= 4,
            // The process has one thread, and nobody is notified.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync
            | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {}
        }
    }
    Ok(Filter { flags, program })
}

/// Installs a filter for the calling thread and what comes of it. Needs no_new_privs or CAP_SYS_ADMIN.
///
/// # Errors
/// What the kernel said.
pub fn install(filter: &Filter) -> io::Result<()> {
    let mut program: Vec<libc::sock_filter> = filter
        .program
        .iter()
        .map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k })
        .collect();
    let whole = libc::sock_fprog {
        len: program.len() as libc::c_ushort,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel reads the program by its length, and both live until the call returns.
    let installed = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            filter.flags,
            &whole,
        )
    };
    match installed {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What becomes of one call: by its arguments, in this order, or else in any case.
#[derive(Default)]
struct Call {
    by_arguments: Vec<(Vec<LinuxSeccompArg>, u32)>,
    always: Option<u32>,
}

/// The decisions of one architecture; the call's number is loaded before.
fn section(
    rules: &[LinuxSyscall],
    default: u32,
    number: impl Fn(&str) -> Option<u32>,
) -> Result<Vec<Instruction>, Error> {
    let mut calls: BTreeMap<u32, Call> = BTreeMap::new();
    for rule in rules {
        let verdict = action(rule.action(), rule.errno_ret())?;
        if verdict == default {
            continue;
        }
        let arguments = rule.args().as_deref().unwrap_or(&[]);
        if let Some(argument) = arguments.iter().find(|argument| argument.index() > 5) {
            return Err(invalid(format!(
                "has a rule about argument {}: 0 to 5 are",
                argument.index()
            )));
        }
        for number in rule.names().iter().filter_map(|name| number(name)) {
            let call = calls.entry(number).or_default();
            if arguments.is_empty() {
                call.always = Some(verdict);
            } else if names_one_twice(arguments) {
                // Several conditions on one argument are alternatives, as in other runtimes.
                let each = arguments.iter().map(|argument| (vec![*argument], verdict));
                call.by_arguments.extend(each);
            } else {
                call.by_arguments.push((arguments.to_vec(), verdict));
            }
        }
    }
    let mut program = Vec::new();
    for (number, call) in calls {
        let otherwise = call.always.unwrap_or(default);
        if call.by_arguments.is_empty() {
            program.extend([(EQUAL, 0, 1, number), (RETURN, 0, 0, otherwise)]);
            continue;
        }
        let mut block = Vec::new();
        for (arguments, verdict) in &call.by_arguments {
            block.extend(rule(arguments, *verdict));
        }
        block.push((RETURN, 0, 0, otherwise));
        program.extend([(EQUAL, 1, 0, number), (JUMP, 0, 0, block.len() as u32)]);
        program.extend(block);
    }
    program.push((RETURN, 0, 0, default));
    Ok(program)
}

fn names_one_twice(arguments: &[LinuxSeccompArg]) -> bool {
    let mut seen = [false; 6];
    arguments
        .iter()
        .any(|argument| std::mem::replace(&mut seen[argument.index()], true))
}

/// Where a comparison goes on.
#[derive(Clone, Copy)]
enum To {
    /// To the next instruction.
    Next,
    /// The condition holds.
    Holds,
    /// The rule does not apply.
    Fails,
}

/// Returns the verdict if all conditions hold, and else goes on after it.
fn rule(arguments: &[LinuxSeccompArg], verdict: u32) -> Vec<Instruction> {
    use To::{Fails, Holds, Next};
    let conditions: Vec<Vec<(u16, To, To, u32)>> = arguments
        .iter()
        .map(|argument| {
            let low_at = AT_ARGUMENTS + 8 * argument.index() as u32;
            let load = |at| (LOAD, Next, Next, at);
            let halves = |value: u64| ((value >> 32) as u32, value as u32);
            let (high, low) = halves(argument.value());
            // First the high half decides, if it can; then the low one.
            let ordered = |high_ways: (To, To), code, low_ways: (To, To)| {
                vec![
                    load(low_at + 4),
                    (GREATER, high_ways.0, Next, high),
                    (EQUAL, Next, high_ways.1, high),
                    load(low_at),
                    (code, low_ways.0, low_ways.1, low),
                ]
            };
            match argument.op() {
                LinuxSeccompOperator::ScmpCmpEq => vec![
                    load(low_at + 4),
                    (EQUAL, Next, Fails, high),
                    load(low_at),
                    (EQUAL, Holds, Fails, low),
                ],
                LinuxSeccompOperator::ScmpCmpNe => vec![
                    load(low_at + 4),
                    (EQUAL, Next, Holds, high),
                    load(low_at),
                    (EQUAL, Fails, Holds, low),
                ],
                LinuxSeccompOperator::ScmpCmpMaskedEq => {
                    // Here the first value is the mask.
                    let (mask_high, mask_low) = (high, low);
                    let (high, low) = halves(argument.value_two().unwrap_or(0));
                    vec![
                        load(low_at + 4),
                        (AND, Next, Next, mask_high),
                        (EQUAL, Next, Fails, high),
                        load(low_at),
                        (AND, Next, Next, mask_low),
                        (EQUAL, Holds, Fails, low),
                    ]
                }
                LinuxSeccompOperator::ScmpCmpGt => ordered((Holds, Fails), GREATER, (Holds, Fails)),
                LinuxSeccompOperator::ScmpCmpGe => {
                    ordered((Holds, Fails), GREATER_OR_EQUAL, (Holds, Fails))
                }
                LinuxSeccompOperator::ScmpCmpLt => {
                    ordered((Fails, Holds), GREATER_OR_EQUAL, (Fails, Holds))
                }
                LinuxSeccompOperator::ScmpCmpLe => ordered((Fails, Holds), GREATER, (Fails, Holds)),
            }
        })
        .collect();
    // Six conditions of six instructions and a return: every distance fits into a byte.
    let length = conditions.iter().map(Vec::len).sum::<usize>() + 1;
    let mut program = Vec::with_capacity(length);
    for condition in conditions {
        let end = program.len() + condition.len();
        for (code, yes, no, operand) in condition {
            let next = program.len() + 1;
            let distance = |to: To| match to {
                Next => 0,
                Holds => (end - next) as u8,
                Fails => (length - next) as u8,
            };
            program.push((code, distance(yes), distance(no), operand));
        }
    }
    program.push((RETURN, 0, 0, verdict));
    program
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, Error> {
    match (action, errno) {
        (LinuxSeccompAction::ScmpActNotify, _) => Err(invalid(
            "wants to notify another process, of which there is none in the guest".into(),
        )),
        (_, Some(errno @ 4096..)) => Err(invalid(format!("has the error number {errno}"))),
        (action, errno) => Ok(action.as_u32(errno)),
    }
}

fn invalid(what: String) -> Error {
    Error::InvalidArgument(format!("the seccomp profile {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOW: u32 = 0x7fff_0000;
    const REFUSE: u32 = 0x0005_0001;

    fn compiled(rules: &str) -> Filter {
        let profile = format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],
            "syscalls":{rules}}}"#
        );
        compile(&serde_json::from_str(&profile).unwrap()).unwrap()
    }

    /// What the kernel would do; panics where it would refuse the program.
    fn verdict(filter: &Filter, architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let load = |at: u32| match at {
            AT_NUMBER => number,
            AT_ARCHITECTURE => architecture,
            16..=60 => {
                let whole = arguments[(at as usize - 16) / 8];
                if at.is_multiple_of(8) {
                    whole as u32
                } else {
                    (whole >> 32) as u32
                }
            }
            other => panic!("a load at {other}"),
        };
        let (mut at, mut value) = (0, 0);
        loop {
            let (code, yes, no, operand) = filter.program[at];
            at += 1;
            let decided = match code {
                LOAD => {
                    value = load(operand);
                    continue;
                }
                AND => {
                    value &= operand;
                    continue;
                }
                JUMP => {
                    at += operand as usize;
                    continue;
                }
                RETURN => return operand,
                EQUAL => value == operand,
                GREATER => value > operand,
                GREATER_OR_EQUAL => value >= operand,
                other => panic!("code {other}"),
            };
            at += usize::from(if decided { yes } else { no });
        }
    }

    fn native(filter: &Filter, number: i64, first: u64) -> u32 {
        verdict(filter, NATIVE, number as u32, [first, 0, 0, 0, 0, 0])
    }

    #[test]
    fn calls_have_their_verdicts() {
        let filter = compiled(
            r#"[{"names":["read","getpid","no_such_call"],"action":"SCMP_ACT_ALLOW"},
            {"names":["clone3"],"action":"SCMP_ACT_ERRNO","errnoRet":38},
            {"names":["ptrace"],"action":"SCMP_ACT_KILL_PROCESS"}]"#,
        );
        assert_eq!(native(&filter, libc::SYS_read, 0), ALLOW);
        assert_eq!(native(&filter, libc::SYS_getpid, 0), ALLOW);
        assert_eq!(native(&filter, libc::SYS_clone3, 0), 0x0005_0000 | 38);
        assert_eq!(native(&filter, libc::SYS_ptrace, 0), KILL_PROCESS);
        assert_eq!(native(&filter, libc::SYS_mount, 0), REFUSE);
        assert_eq!(native(&filter, 100_000, 0), REFUSE);
    }

    #[test]
    fn architectures_are_kept_apart() {
        let filter = compiled(r#"[{"names":["getpid"],"action":"SCMP_ACT_ALLOW"}]"#);
        let none = [0; 6];
        // 20 is getpid for 32-bit programs, and writev for others; 39 is mkdir and getpid.
        assert_eq!(verdict(&filter, I386, 20, none), ALLOW);
        assert_eq!(verdict(&filter, I386, 39, none), REFUSE);
        assert_eq!(verdict(&filter, NATIVE, 20, none), REFUSE);
        assert_eq!(verdict(&filter, NATIVE, 39, none), ALLOW);
        assert_eq!(verdict(&filter, NATIVE, X32_BIT | 39, none), NO_SUCH_CALL);
        assert_eq!(verdict(&filter, 0xc000_00b7, 39, none), KILL_PROCESS);
        let one = r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#;
        let filter = compile(&serde_json::from_str(one).unwrap()).unwrap();
        assert_eq!(verdict(&filter, NATIVE, 39, none), ALLOW);
        assert_eq!(verdict(&filter, I386, 20, none), KILL_PROCESS);
    }

    #[test]
    fn every_comparison_at_its_edges() {
        let big = 0x1_0000_0005_u64;
        let holds = |operator: &str, value: u64| -> bool {
            match operator {
                "NE" => value != big,
                "LT" => value < big,
                "LE" => value <= big,
                "EQ" => value == big,
                "GE" => value >= big,
                _ => value > big,
            }
        };
        for operator in ["NE", "LT", "LE", "EQ", "GE", "GT"] {
            let filter = compiled(&format!(
                r#"[{{"names":["socket"],"action":"SCMP_ACT_ALLOW",
                "args":[{{"index":0,"value":{big},"op":"SCMP_CMP_{operator}"}}]}}]"#
            ));
            for value in [
                0,
                5,
                6,
                big - 1,
                big,
                big + 1,
                0x1_0000_0000,
                0x2_0000_0000,
                u64::MAX,
            ] {
                let expected = if holds(operator, value) {
                    ALLOW
                } else {
                    REFUSE
                };
                let got = native(&filter, libc::SYS_socket, value);
                assert_eq!(got, expected, "{value:#x} {operator} {big:#x}");
            }
        }
    }

    #[test]
    fn masks_alternatives_and_several_arguments() {
        let filter = compiled(
            r#"[{"names":["clone"],"action":"SCMP_ACT_ALLOW",
              "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]},
            {"names":["personality"],"action":"SCMP_ACT_ALLOW",
              "args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
            {"names":["dup3"],"action":"SCMP_ACT_ALLOW",
              "args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":1,"value":2,"op":"SCMP_CMP_EQ"}]},
            {"names":["dup3"],"action":"SCMP_ACT_ALLOW",
              "args":[{"index":5,"value":9,"op":"SCMP_CMP_GE"}]},
            {"names":["kill"],"action":"SCMP_ACT_KILL",
              "args":[{"index":1,"value":9,"op":"SCMP_CMP_EQ"}]},
            {"names":["kill"],"action":"SCMP_ACT_ALLOW"}]"#,
        );
        assert_eq!(native(&filter, libc::SYS_clone, 0x11), ALLOW);
        assert_eq!(native(&filter, libc::SYS_clone, 0x1000_0000), REFUSE);
        for (value, expected) in [(0, ALLOW), (8, ALLOW), (1, REFUSE)] {
            assert_eq!(native(&filter, libc::SYS_personality, value), expected);
        }
        for (arguments, expected) in [
            ([1, 2, 0, 0, 0, 0], ALLOW),
            ([1, 3, 0, 0, 0, 0], REFUSE),
            ([0, 2, 0, 0, 0, 8], REFUSE),
            ([0, 0, 0, 0, 0, 9], ALLOW),
        ] {
            let number = libc::SYS_dup3 as u32;
            assert_eq!(verdict(&filter, NATIVE, number, arguments), expected);
        }
        let number = libc::SYS_kill as u32;
        assert_eq!(verdict(&filter, NATIVE, number, [1, 9, 0, 0, 0, 0]), 0);
        assert_eq!(verdict(&filter, NATIVE, number, [1, 15, 0, 0, 0, 0]), ALLOW);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for profile in [
            r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#,
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":70000}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO",
                "args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
        ] {
            let refused = compile(&serde_json::from_str(profile).unwrap());
            assert!(
                matches!(refused, Err(Error::InvalidArgument(_))),
                "{profile}"
            );
        }
        let argument = r#"{"index":0,"value":1,"op":"SCMP_CMP_EQ"}"#;
        let many = vec![argument; 2000].join(",");
        let profile = format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["read"],"action":"SCMP_ACT_ERRNO","args":[{many}]}}]}}"#
        );
        let refused = compile(&serde_json::from_str(&profile).unwrap()).unwrap_err();
        assert!(refused.to_string().contains("instructions"), "{refused}");
    }
}
