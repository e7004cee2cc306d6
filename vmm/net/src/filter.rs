//! Redirects of tc: what comes into one interface leaves by another.
//!
//! The filter is u32 without a key, which any kernel with tc has and any frame matches; its action is mirred. It is known by
//! the action's cookie (TCA_ACT_COOKIE), which the kernel keeps and does not read: the TAP interface's name, which no other
//! mirror has.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption,
    TcActionOption, TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage,
    TcMirror, TcMirrorActionType, TcOption, TcU32Selector, TcU32SelectorFlags,
};

use crate::Error;
use crate::link::Link;
use crate::netlink::{Socket, says};

/// The only discipline with a hook for what comes in that does nothing else; `ingress` is its elder.
const CLSACT: &str = "clsact";
/// Among filters, ours comes at this place. Nobody else picks the number.
const PRIORITY: u16 = 0x6e61;

/// A hook of clsact.
#[derive(Debug, Clone, Copy)]
enum Hook {
    Ingress,
    Egress,
}

impl Hook {
    fn handle(self) -> TcHandle {
        TcHandle {
            major: TcHandle::CLSACT.major,
            minor: match self {
                Self::Ingress => TcHandle::MIN_INGRESS,
                Self::Egress => TcHandle::MIN_EGRESS,
            },
        }
    }
}

/// Whose filters are at a hook.
#[derive(Debug, Default)]
struct Filters {
    /// Priorities and protocols (as `tcm_info`) of those whose action has the cookie.
    ours: Vec<u32>,
    /// Whether there are more.
    others: bool,
}

fn message(link: &Link, parent: TcHandle, attributes: Vec<TcAttribute>) -> TcMessage {
    // An interface's number is positive, and the kernel's own type here is signed.
    let mut message = TcMessage::with_index(link.index.cast_signed());
    message.header.parent = parent;
    message.attributes = attributes;
    message
}

/// The queueing discipline for what comes in, by its kind.
fn discipline(socket: &mut Socket, link: &Link) -> Result<Option<String>, Error> {
    let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
    // Those that cannot be read are of kinds with options, and these two have none.
    let dump = socket.dump("the queueing disciplines", &request)?;
    Ok(dump.messages.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewQueueDiscipline(found)
            if found.header.index == link.index.cast_signed()
                && found.header.parent == TcHandle::CLSACT =>
        {
            found
                .attributes
                .into_iter()
                .find_map(|attribute| match attribute {
                    TcAttribute::Kind(kind) => Some(kind),
                    _ => None,
                })
        }
        _ => None,
    }))
}

fn filters(
    socket: &mut Socket,
    link: &Link,
    hook: Hook,
    ours: impl Fn(&[u8]) -> bool,
) -> Result<Filters, Error> {
    let request = message(link, hook.handle(), Vec::new());
    let dump = socket.dump(
        &format!("the filters of {}", link.name),
        &RouteNetlinkMessage::GetTrafficFilter(request),
    )?;
    let mut seen = Vec::new();
    let mut filters = Filters::default();
    for answer in &dump.messages {
        let RouteNetlinkMessage::NewTrafficFilter(found) = answer else {
            continue;
        };
        seen.push(found.header.info);
        if cookies(found).any(&ours) {
            filters.ours.push(found.header.info);
        }
    }
    // A u32 filter shows its tables too, at the same place.
    filters.others =
        dump.unreadable.is_some() || seen.iter().any(|info| !filters.ours.contains(info));
    Ok(filters)
}

/// The cookies of a filter's actions.
fn cookies(filter: &TcMessage) -> impl Iterator<Item = &[u8]> {
    let options = filter
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        });
    let actions = options.flatten().filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    });
    let attributes = actions.flatten().flat_map(|action| &action.attributes);
    attributes.filter_map(|attribute| match attribute {
        TcActionAttribute::Cookie(cookie) => Some(cookie.as_slice()),
        _ => None,
    })
}

/// Whether an interface's frames can be taken, and whether that needs a discipline of our own. Mirrors' cookies all begin with
/// `prefix`.
pub(crate) fn survey(socket: &mut Socket, link: &Link, prefix: &str) -> Result<bool, Error> {
    let Some(kind) = discipline(socket, link)? else {
        return Ok(true);
    };
    let mirrors = |cookie: &[u8]| cookie.starts_with(prefix.as_bytes());
    let filters = filters(socket, link, Hook::Ingress, mirrors)?;
    if filters.ours.is_empty() && !filters.others {
        return Ok(false);
    }
    let whose = if filters.others {
        "tc filters of someone else's, and either they or the guest would miss frames; remove them, or move them to the other \
         end of the link"
    } else {
        "a tc filter that leads to a guest already: another VM may have this namespace, and containers that share one are to be in one VM; if that VM is gone, remove what was made for it"
    };
    Err(Error::Interface {
        interface: link.name.clone(),
        why: format!("its {kind} queueing discipline has {whose}"),
    })
}

/// Makes the discipline that has a hook for what comes in.
pub(crate) fn add_discipline(socket: &mut Socket, link: &Link) -> Result<(), Error> {
    let mut message = message(
        link,
        TcHandle::CLSACT,
        vec![TcAttribute::Kind(CLSACT.to_owned())],
    );
    message.header.handle = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: 0,
    };
    socket.change(
        ("make a clsact queueing discipline at", &link.name),
        RouteNetlinkMessage::NewQueueDiscipline(message),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

/// Has all that comes into `from` leave by `to`.
pub(crate) fn redirect(
    socket: &mut Socket,
    from: &Link,
    to: &Link,
    cookie: &str,
) -> Result<(), Error> {
    redirect_at(socket, from, to, cookie, PRIORITY)
}

/// As [`redirect`], among other filters at another place.
pub(crate) fn redirect_at(
    socket: &mut Socket,
    from: &Link,
    to: &Link,
    cookie: &str,
    priority: u16,
) -> Result<(), Error> {
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to.index;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Cookie(cookie.as_bytes().to_vec()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    let mut all = TcU32Selector::default();
    all.flags = TcU32SelectorFlags::Terminal;
    let options = [
        TcFilterU32Option::Selector(all),
        TcFilterU32Option::Action(vec![action]),
    ];
    let mut message = message(
        from,
        Hook::Ingress.handle(),
        vec![
            TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
            TcAttribute::Options(options.map(TcOption::U32).into()),
        ],
    );
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    message.header.info = (u32::from(priority) << 16) | u32::from(protocol);
    socket.change(
        (
            "redirect what comes into",
            &format!("{} to {}", from.name, to.name),
        ),
        RouteNetlinkMessage::NewTrafficFilter(message),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}

/// Removes the redirect with this cookie, and the discipline if it is ours and nobody else uses it by now.
pub(crate) fn remove(
    socket: &mut Socket,
    link: &Link,
    cookie: &str,
    ours: bool,
) -> Result<(), Error> {
    let gone = |error: &Error| {
        [libc::ENODEV, libc::ENOENT]
            .iter()
            .any(|errno| says(error, *errno))
    };
    let Some(kind) = discipline(socket, link)? else {
        return Ok(());
    };
    let own = |found: &[u8]| found == cookie.as_bytes();
    let at_ingress = filters(socket, link, Hook::Ingress, own)?;
    // A table and its filter are at one place: one request takes both.
    let mut places = at_ingress.ours;
    places.dedup();
    for info in places {
        let mut message = message(link, Hook::Ingress.handle(), Vec::new());
        message.header.info = info;
        let deleted = socket.change(
            ("delete the redirect at", &link.name),
            RouteNetlinkMessage::DelTrafficFilter(message),
            0,
        );
        match deleted {
            Err(error) if gone(&error) => {}
            result => result?,
        }
    }
    if !ours || kind != CLSACT || at_ingress.others {
        return Ok(());
    }
    let at_egress = filters(socket, link, Hook::Egress, own)?;
    if at_egress.others {
        return Ok(());
    }
    let message = message(link, TcHandle::CLSACT, Vec::new());
    let deleted = socket.change(
        ("delete the clsact queueing discipline at", &link.name),
        RouteNetlinkMessage::DelQueueDiscipline(message),
        0,
    );
    match deleted {
        Err(error) if gone(&error) => Ok(()),
        result => result,
    }
}
