//! A model's layers, of which all or the first stay in the device's memory and the others come to it each time that they are run.

use std::{
    ops::Range,
    sync::{Arc, mpsc::sync_channel},
    thread,
};

use crate::{
    Result, Weights,
    streamed::{Sender, Streamed},
};

/// Reads a layer by its number.
type Load<L> = Box<dyn Fn(&Weights, usize) -> Result<L> + Send + Sync>;

/// Which layers stay where; by default all on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stay {
    /// The first ones, and at least one, that stay on the device; all if none is said.
    pub resident: Option<usize>,
    /// Whether the others stay in the host's memory, where the device has another: else their files are read at each pass.
    pub on_host: bool,
    /// Whether the layers go with the request that loads them, whose cancellation then ends a pass; later requests have their own.
    pub for_one_request: bool,
}

/// `count` layers that are run in order.
///
/// A layer that does not stay on the device is read by another thread while the one before it computes, and dropped once it has
/// been run: two of them are there at a time. What reading costs is thus hidden where it takes no longer than computing. A GPU
/// is told to copy it beside the computation, see [`retouch_kernels::streaming`]; neither thread waits for the GPU then.
pub struct Layers<L> {
    /// The first ones.
    resident: Vec<L>,
    count: usize,
    /// None where all stay, and their files can be closed.
    others: Option<Others<L>>,
}

/// Layers that do not stay.
struct Others<L> {
    load: Load<L>,
    weights: Weights,
    /// On a device that copies while it computes.
    streamed: Option<Arc<Streamed>>,
}

/// A layer that can be run.
struct Ready<L> {
    layer: L,
    /// Has its memory on the device, and is thus dropped after it.
    sender: Option<Sender>,
}

impl<L> Others<L> {
    fn read(&self, i: usize) -> Result<Ready<L>> {
        let Some(streamed) = &self.streamed else {
            return Ok(Ready { layer: (self.load)(&self.weights, i)?, sender: None });
        };
        let sender = streamed.sender()?;
        let layer = (self.load)(&self.weights.sent_by(sender.clone()), i)?;
        sender.finish()?;
        Ok(Ready { layer, sender: Some(sender) })
    }
}

impl<L: Send> Layers<L> {
    /// Reads the layers of `weights` that stay; `load` reads one.
    pub fn load(
        weights: &Weights,
        count: usize,
        stay: Stay,
        load: impl Fn(&Weights, usize) -> Result<L> + Send + Sync + 'static,
    ) -> Result<Self> {
        let kept = stay.resident.map_or(count, |resident| resident.clamp(1, count.max(1)).min(count));
        let resident = (0..kept).map(|i| load(weights, i)).collect::<Result<_>>()?;
        let others = (kept < count).then(|| Others {
            load: Box::new(load),
            weights: if stay.for_one_request { weights.clone() } else { weights.without_cancel() },
            streamed: weights.feed().map(|feed| Streamed::new(feed, stay.on_host)),
        });
        Ok(Self { resident, count, others })
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
        let Some(others) = self.others.as_ref().filter(|_| range.end > kept) else {
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
                    if sender.send(others.read(i)).is_err() {
                        break; // the run has failed
                    }
                }
            });
            for i in range {
                state = match self.resident.get(i) {
                    Some(layer) => run(state, i, layer)?,
                    None => {
                        let ready = receiver.recv().map_err(candle_core::Error::wrap)?;
                        let Ready { layer, sender } = &ready.map_err(candle_core::Error::from)?;
                        if let Some(sender) = sender {
                            sender.arrive()?;
                        }
                        run(state, i, layer)?
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

    use candle_core::DType;

    use super::*;
    use crate::{WeightsError, convert::Target};

    /// Layers of no parameters.
    fn layers<L: Send>(
        count: usize,
        resident: Option<usize>,
        load: impl Fn(usize) -> Result<L> + Send + Sync + 'static,
    ) -> Result<Layers<L>> {
        let weights = Weights::assumed(Target::Bf16, DType::F32)?;
        Layers::load(&weights, count, Stay { resident, on_host: false, for_one_request: true }, move |_, i| load(i))
    }

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
        let layers = layers(count, resident, move |number| {
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
        let (some, alive, _) = counted(5, Some(1));
        let failed = some.run(0..5, (), |(), i, _| if i == 2 { candle_core::bail!("two") } else { Ok(()) });
        assert!(failed.unwrap_err().to_string().contains("two"));
        assert_eq!(alive.load(Ordering::SeqCst), 1);
        let unreadable = |i: usize| if i == 3 { Err(WeightsError::Cancelled) } else { Ok(i) };
        let read = layers(5, Some(1), unreadable).unwrap();
        assert!(read.run(0..5, (), |(), _, _| Ok(())).unwrap_err().to_string().contains("cancelled"));
        assert!(layers(5, None, unreadable).is_err());
        // What a device says when its memory is full has to be recognised above.
        let full = || candle_core::Error::Cuda("out of memory".into());
        let full = layers(5, Some(1), move |i| if i == 3 { Err(full().into()) } else { Ok(i) }).unwrap();
        assert!(matches!(full.run(0..5, (), |(), _, _| Ok(())), Err(candle_core::Error::Cuda(_))));
    }
}
