//! Which zone plugged memory goes to. Memory of the movable zone can be taken
//! offline again, but the kernel keeps none of its own data there: where too
//! much is movable, the kernel starves beside free memory.

/// Movable memory for each byte of the kernel's, at most. The kernel's own rule (`auto_movable_ratio`) is set to the
/// same, in percent and with a little more, for the pages that a zone has but does not manage.
const RATIO: u64 = 3;

/// Where a block of memory is, as far as unplugging it is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zone {
    /// What is in it can be moved away.
    Movable,
    /// Any other: the kernel's own data may be in it.
    Kernel,
}

impl Zone {
    /// What brings a block online in it, as `memoryN/state` takes it.
    pub fn online_word(self) -> &'static str {
        match self {
            Zone::Movable => "online_movable",
            Zone::Kernel => "online_kernel",
        }
    }

    /// By the kernel's name, e.g. `Movable` or `Normal`.
    pub fn named(name: &str) -> Zone {
        match name {
            "Movable" => Zone::Movable,
            _ => Zone::Kernel,
        }
    }
}

/// Bytes that the buddy allocator manages, by zone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Managed {
    /// Of the movable zone.
    pub movable: u64,
    /// Of all others.
    pub kernel: u64,
}

impl Managed {
    /// What `/proc/zoneinfo` says; lines that are no `managed` of a zone are skipped.
    pub fn parse(zoneinfo: &str, page_bytes: u64) -> Managed {
        let mut managed = Managed::default();
        let mut zone = None;
        for line in zoneinfo.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                // Node 0, zone   Movable
                (Some("Node"), _) => zone = line.split_whitespace().nth(3).map(Zone::named),
                (Some("managed"), Some(pages)) => {
                    let bytes = pages.parse::<u64>().unwrap_or(0).saturating_mul(page_bytes);
                    if let Some(zone) = zone {
                        managed.add(zone, bytes);
                    }
                }
                _ => {}
            }
        }
        managed
    }

    /// Counts memory that comes to a zone.
    pub fn add(&mut self, zone: Zone, bytes: u64) {
        let of_zone = match zone {
            Zone::Movable => &mut self.movable,
            Zone::Kernel => &mut self.kernel,
        };
        *of_zone = of_zone.saturating_add(bytes);
    }

    /// The zone for one more block: movable while movable : kernel stays within 3 : 1 with the block in it.
    pub fn zone_for(&self, block_bytes: u64) -> Zone {
        let movable = self.movable.saturating_add(block_bytes);
        match movable <= self.kernel.saturating_mul(RATIO) {
            true => Zone::Movable,
            false => Zone::Kernel,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const ZONEINFO: &str = "Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 12
  pages free     3840
        boost    0
        min      84
        spanned  4095
        present  3998
        managed  3840
        cma      0
        protection: (0, 930, 930, 930, 930)
Node 0, zone    DMA32
  pages free     180000
        managed  256
Node 0, zone   Normal
  pages free     0
        managed  0
Node 0, zone  Movable
  pages free     32512
        managed  32768
  pagesets
    cpu: 0
              count: 0
Node 1, zone  Movable
        managed  x
";

    #[test]
    fn the_movable_zone_is_counted_apart_from_all_others() {
        let managed = Managed::parse(ZONEINFO, 4096);
        assert_eq!(
            managed,
            Managed {
                movable: 128 * MIB,
                kernel: 16 * MIB
            }
        );
        assert_eq!(Managed::parse("", 4096), Managed::default());
        let huge = format!("Node 0, zone Movable\n managed {}\n", u64::MAX);
        assert_eq!(Managed::parse(&huge, 4096).movable, u64::MAX);
    }

    #[test]
    fn memory_is_movable_within_three_to_one_with_what_comes() {
        let table = [
            // Kernel, movable and block in MiB.
            (512, 0, 128, Zone::Movable),
            (512, 1408, 128, Zone::Movable),
            (512, 1409, 128, Zone::Kernel),
            (512, 1536, 128, Zone::Kernel),
            (43, 0, 128, Zone::Movable),
            (42, 0, 128, Zone::Kernel),
            (0, 0, 128, Zone::Kernel),
            (1024, 0, 2048, Zone::Movable),
            (600, 0, 2048, Zone::Kernel),
        ];
        for (kernel, movable, block, zone) in table {
            let managed = Managed {
                movable: movable * MIB,
                kernel: kernel * MIB,
            };
            assert_eq!(
                managed.zone_for(block * MIB),
                zone,
                "{managed:?} and {block} MiB"
            );
        }
        let most = Managed {
            movable: u64::MAX,
            kernel: u64::MAX,
        };
        assert_eq!(most.zone_for(u64::MAX), Zone::Movable, "no overflow");
    }

    #[test]
    fn a_run_of_blocks_is_decided_one_after_the_other() {
        let mut managed = Managed {
            movable: 0,
            kernel: 100 * MIB,
        };
        let zones: Vec<Zone> = (0..6)
            .map(|_| {
                let zone = managed.zone_for(128 * MIB);
                managed.add(zone, 128 * MIB);
                zone
            })
            .collect();
        // 100 MiB carry two blocks; the third goes to the kernel, and then there is room for three more.
        let (m, k) = (Zone::Movable, Zone::Kernel);
        assert_eq!(zones, [m, m, k, m, m, m]);
    }
}
