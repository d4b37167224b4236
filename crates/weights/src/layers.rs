//! A model's layers, of which all or the first stay in memory and the others are read each time that they are run.

use std::{ops::Range, sync::mpsc::sync_channel, thread};

use crate::Result;

/// Reads a layer by its number.
type Load<L> = Box<dyn Fn(usize) -> Result<L> + Send + Sync>;

/// `count` layers that are run in order.
///
/// A layer that does not stay is read by another thread while the one before it computes, and dropped once it has been
/// run: two of them are in memory at a time. What reading costs is thus hidden where it takes no longer than computing.
pub struct Layers<L> {
    /// The first ones.
    resident: Vec<L>,
    count: usize,
    /// None where all stay, and their files can be closed.
    load: Option<Load<L>>,
}

impl<L: Send> Layers<L> {
    /// Reads the first `resident` of `count` layers, and at least one; all if none is said.
    pub fn load(
        count: usize,
        resident: Option<usize>,
        load: impl Fn(usize) -> Result<L> + Send + Sync + 'static,
    ) -> Result<Self> {
        let kept = resident.map_or(count, |resident| resident.clamp(1, count.max(1)).min(count));
        let resident = (0..kept).map(&load).collect::<Result<_>>()?;
        Ok(Self { resident, count, load: (kept < count).then(|| Box::new(load) as Load<L>) })
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Runs the layers of `range` one after the other: `run` gets what it returned for the layer before (`state` at first),
    /// the layer's number and the layer.
    ///
    /// # Errors
    /// Those of `run`, and of reading a layer.
    pub fn run<S>(
        &self,
        range: Range<usize>,
        mut state: S,
        mut run: impl FnMut(S, usize, &L) -> candle_core::Result<S>,
    ) -> candle_core::Result<S> {
        let kept = self.resident.len();
        let Some(load) = self.load.as_ref().filter(|_| range.end > kept) else {
            for i in range {
                state = run(state, i, &self.resident[i])?;
            }
            return Ok(state);
        };
        thread::scope(|scope| {
            // Without a buffer: the thread waits with a layer in its hands.
            let (sender, receiver) = sync_channel(0);
            let read = range.start.max(kept)..range.end;
            scope.spawn(move || {
                for i in read {
                    if sender.send(load(i)).is_err() {
                        break; // the run has failed
                    }
                }
            });
            for i in range {
                state = match self.resident.get(i) {
                    Some(layer) => run(state, i, layer)?,
                    None => {
                        let layer = receiver.recv().map_err(candle_core::Error::wrap)?;
                        run(state, i, &layer.map_err(candle_core::Error::wrap)?)?
                    }
                };
            }
            Ok(state)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::WeightsError;

    /// A layer that knows how many of its kind there are at a time.
    struct Counted {
        number: usize,
        alive: Arc<AtomicUsize>,
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.alive.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The layers, how many are in memory, and the most that ever were.
    fn counted(count: usize, resident: Option<usize>) -> (Layers<Counted>, Arc<AtomicUsize>, Arc<AtomicUsize>) {
        let (alive, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let counters = (alive.clone(), most.clone());
        let layers = Layers::load(count, resident, move |number| {
            let (alive, most) = &counters;
            most.fetch_max(alive.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            Ok(Counted { number, alive: alive.clone() })
        });
        (layers.unwrap(), alive, most)
    }

    #[test]
    fn layers_run_in_order_however_many_stay() {
        for resident in [None, Some(0), Some(1), Some(3), Some(6), Some(9)] {
            let (layers, ..) = counted(6, resident);
            for _ in 0..2 {
                for range in [0..6, 1..6, 4..6, 0..3, 2..2] {
                    let seen = layers
                        .run(range.clone(), Vec::new(), |mut seen, i, layer| {
                            assert_eq!(i, layer.number);
                            seen.push(i);
                            Ok(seen)
                        })
                        .unwrap();
                    assert_eq!(seen, range.collect::<Vec<_>>(), "{resident:?}");
                }
            }
        }
    }

    #[test]
    fn only_the_one_that_runs_and_the_next_are_in_memory_beside_those_that_stay() {
        for (resident, expected) in [(1, 3), (2, 4), (4, 5), (5, 5)] {
            let (layers, alive, most) = counted(5, Some(resident));
            for _ in 0..3 {
                layers.run(0..5, (), |(), _, _| Ok(())).unwrap();
                assert_eq!(alive.load(Ordering::SeqCst), resident);
            }
            assert!(most.load(Ordering::SeqCst) <= expected, "{} with {resident}", most.load(Ordering::SeqCst));
        }
    }

    #[test]
    fn a_failure_ends_the_run() {
        let (layers, alive, _) = counted(5, Some(1));
        let failed = layers.run(0..5, (), |(), i, _| if i == 2 { candle_core::bail!("two") } else { Ok(()) });
        assert!(failed.unwrap_err().to_string().contains("two"));
        assert_eq!(alive.load(Ordering::SeqCst), 1);
        let unreadable = |i: usize| if i == 3 { Err(WeightsError::Cancelled) } else { Ok(i) };
        let layers = Layers::load(5, Some(1), unreadable).unwrap();
        assert!(layers.run(0..5, (), |(), _, _| Ok(())).unwrap_err().to_string().contains("cancelled"));
        assert!(Layers::load(5, None, unreadable).is_err());
    }
}
