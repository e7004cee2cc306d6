//! The device next to the specification's words as a model.

use proptest::prelude::*;
use vm_memory::Address;

use super::*;

/// What the specification says of blocks, without slots or memory.
#[derive(Default)]
struct Model {
    plugged: Vec<bool>,
    requested: u64,
    usable: u64,
}

impl Model {
    fn ask(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        if kind == UNPLUG_ALL {
            self.plugged.fill(false);
            self.usable = CONFIG.usable(self.requested);
            return (ACK, 0);
        }
        let size = u128::from(blocks) * u128::from(BLOCK);
        let (start, end) = (u128::from(address), u128::from(address) + size);
        let usable = u128::from(BASE)..u128::from(BASE + self.usable) + 1;
        if kind > STATE
            || !address.is_multiple_of(BLOCK)
            || blocks == 0
            || !usable.contains(&start)
            || !usable.contains(&end)
        {
            return (ERROR, 0);
        }
        let first = ((address - BASE) / BLOCK) as usize;
        let range = first..first + usize::from(blocks);
        let count = self.plugged[range.clone()].iter().filter(|p| **p).count();
        let all = self.plugged.iter().filter(|p| **p).count() as u64 * BLOCK;
        match (kind, count) {
            (STATE, 0) => (ACK, UNPLUGGED),
            (STATE, count) if count == range.len() => (ACK, PLUGGED),
            (STATE, _) => (ACK, MIXED),
            (PLUG, 1..) => (ERROR, 0),
            (PLUG, _) if all + size as u64 > self.requested => (NACK, 0),
            (UNPLUG, count) if count != range.len() => (ERROR, 0),
            _ => {
                self.plugged[range].fill(kind == PLUG);
                (ACK, 0)
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_is_asked_the_answers_and_slots_are_those_of_the_model(
        steps in prop::collection::vec(
            (
                prop_oneof![8 => 0..4_u16, 1 => any::<u16>()],
                prop_oneof![
                    16 => (0..REGION / BLOCK).prop_map(|n| BASE + n * BLOCK),
                    4 => (0..4_u64).prop_map(|n| BASE + n * SLOT),
                    1 => any::<u64>(),
                ],
                prop_oneof![8 => 0..100_u16, 2 => (0..5_u16).prop_map(|n| n * PER_SLOT), 1 => any::<u16>()],
                prop::option::weighted(0.3, 0..=REGION / BLOCK),
            ),
            1..40,
        ),
    ) {
        let mut rig = Rig::new(0);
        let mut model = Model {
            plugged: vec![false; (REGION / BLOCK) as usize],
            ..Model::default()
        };
        for (kind, address, blocks, request) in steps {
            if let Some(request) = request {
                model.requested = request * BLOCK;
                model.usable = model.usable.max(CONFIG.usable(model.requested));
                rig.host.set_requested(model.requested).expect("requested");
            }
            let expected = model.ask(kind, address, blocks);
            prop_assert_eq!(rig.ask(kind, address, blocks), expected);
            let slots: Vec<u64> = model
                .plugged
                .chunks(usize::from(PER_SLOT))
                .enumerate()
                .filter(|(_, blocks)| blocks.contains(&true))
                .map(|(slot, _)| slot as u64)
                .collect();
            prop_assert_eq!(rig.slots(), slots);
            prop_assert_eq!(rig.host.status().usable, model.usable);
            let last = rig.memory.ram().memory().last_addr().raw_value();
            prop_assert!(last < BASE + REGION);
        }
    }
}
