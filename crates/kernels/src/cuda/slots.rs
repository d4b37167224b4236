//! The order in which layers are copied to a GPU and computed with: who waits for whom.
//!
//! Copies and computation are two lanes, each of which does its work in order while the host goes on. A layer is copied to one
//! of two slots while the other's is computed. The computation waits for the end of a layer's copies, the copies to a slot wait
//! for the end of the computation with the layer that was there before. Memory is taken and given back in the computation's
//! lane, and mostly neither: a slot keeps its places, and a layer of the same forms and shapes is copied over the last.

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{Result, bail};

use crate::streaming::{Delivery, Feed, Pinned, Placed, Source, Spec};

const SLOTS: usize = 2;

/// The two lanes of a GPU.
pub trait Lanes: Send + Sync + 'static {
    /// Memory of the GPU; given back, in the computation's lane, when its last clone is dropped.
    type Place: Clone + Send;
    /// A moment in a lane: when all that is in it by now has been done.
    type Mark: Send;

    /// Takes memory, which is there from this moment of the computation's lane on.
    fn place(&self, spec: &Spec) -> Result<Self::Place>;

    /// Copies to a place, in the copies' lane.
    fn send(&self, place: &Self::Place, source: Source<'_>) -> Result<()>;

    /// This moment of the copies' lane.
    fn copied(&self) -> Result<Self::Mark>;

    /// This moment of the computation's lane.
    fn computed(&self) -> Result<Self::Mark>;

    /// Whatever comes into the copies' lane later waits for `mark`.
    fn copy_after(&self, mark: &Self::Mark) -> Result<()>;

    /// Whatever comes into the computation's lane later waits for `mark`.
    fn compute_after(&self, mark: &Self::Mark) -> Result<()>;

    fn pin(&self, pieces: &[&[u8]]) -> Option<Pinned>;
}

/// Two slots for the layers that go through them.
pub struct Slots<L: Lanes>(Arc<Shared<L>>);

struct Shared<L: Lanes> {
    lanes: L,
    /// The slots that no layer is in.
    free: Mutex<Vec<Slot<L>>>,
}

struct Slot<L: Lanes> {
    places: Vec<(Spec, L::Place)>,
    /// When the computation with the slot's last layer ends.
    computed: Option<L::Mark>,
}

/// A layer in its slot.
pub struct Layer<L: Lanes> {
    shared: Arc<Shared<L>>,
    places: Vec<(Spec, L::Place)>,
    /// Places of the slot's last layer that this one has not taken over yet, in their order.
    left: VecDeque<(Spec, L::Place)>,
    /// The end of the copies.
    copied: Option<L::Mark>,
    arrived: bool,
}

impl<L: Lanes> Slots<L> {
    pub fn new(lanes: L) -> Self {
        let free = (0..SLOTS).map(|_| Slot { places: Vec::new(), computed: None }).collect();
        Self(Arc::new(Shared { lanes, free: Mutex::new(free) }))
    }

    pub fn begin(&self) -> Result<Layer<L>> {
        // The last that became free: where a pass has but one layer, the other slot takes no memory.
        let slot = self.0.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let Some(slot) = slot else { bail!("a third layer is sent to the GPU while two are there") };
        let left = slot.places.into();
        let layer = Layer { shared: self.0.clone(), places: Vec::new(), left, copied: None, arrived: false };
        if let Some(computed) = &slot.computed {
            layer.shared.lanes.copy_after(computed)?;
        }
        Ok(layer)
    }
}

impl<L: Lanes> Layer<L> {
    pub fn put(&mut self, spec: Spec, source: Source<'_>) -> Result<L::Place> {
        if source.bytes() != spec.bytes() {
            bail!("{} bytes are sent to a place of {}", source.bytes(), spec.bytes())
        }
        let place = self.place(&spec)?;
        // Noted before it is written: whatever fails, it is not given back under a copy.
        self.places.push((spec, place.clone()));
        self.shared.lanes.send(&place, source)?;
        Ok(place)
    }

    /// A place of the slot's last layer, else a new one.
    fn place(&mut self, spec: &Spec) -> Result<L::Place> {
        if let Some(at) = self.left.iter().position(|(other, _)| other == spec)
            && let Some((_, place)) = self.left.remove(at)
        {
            return Ok(place);
        }
        // In the memory of those that were there in its stead: the slot takes no more than the larger of both layers.
        let mut room = 0;
        while room < spec.bytes()
            && let Some((other, _)) = self.left.pop_front()
        {
            room += other.bytes();
        }
        let lanes = &self.shared.lanes;
        let place = lanes.place(spec)?;
        lanes.copy_after(&lanes.computed()?)?;
        Ok(place)
    }

    pub fn finish(&mut self) -> Result<()> {
        self.left.clear();
        self.copied = Some(self.shared.lanes.copied()?);
        Ok(())
    }

    pub fn arrive(&mut self) -> Result<()> {
        if self.copied.is_none() {
            self.finish()?;
        }
        if let Some(copied) = &self.copied {
            self.shared.lanes.compute_after(copied)?;
        }
        self.arrived = true;
        Ok(())
    }

    /// The end of the computation. A layer that nobody computed with was copied all the same.
    fn computed(&mut self) -> Result<L::Mark> {
        if !self.arrived {
            self.arrive()?;
        }
        self.shared.lanes.computed()
    }
}

impl<L: Lanes> Drop for Layer<L> {
    fn drop(&mut self) {
        let computed = self.computed();
        let mut places = mem::take(&mut self.places);
        places.extend(mem::take(&mut self.left));
        let slot = match computed {
            Ok(computed) => Slot { places, computed: Some(computed) },
            Err(_) => {
                // A GPU that marks nothing any more has failed, which the next operation says. What it may still be writing to
                // is nobody else's.
                mem::forget(places);
                Slot { places: Vec::new(), computed: None }
            }
        };
        self.shared.free.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
    }
}

impl<L: Lanes<Place = Placed>> Feed for Slots<L> {
    fn next(&self) -> Result<Box<dyn Delivery>> {
        Ok(Box::new(self.begin()?))
    }

    fn pin(&self, pieces: &[&[u8]]) -> Option<Pinned> {
        self.0.lanes.pin(pieces)
    }
}

impl<L: Lanes<Place = Placed>> Delivery for Layer<L> {
    fn put(&mut self, spec: Spec, source: Source<'_>) -> Result<Placed> {
        Layer::put(self, spec, source)
    }

    fn finish(&mut self) -> Result<()> {
        Layer::finish(self)
    }

    fn arrive(&mut self) -> Result<()> {
        Layer::arrive(self)
    }
}

#[cfg(test)]
mod tests;
