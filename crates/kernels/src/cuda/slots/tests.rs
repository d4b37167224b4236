//! Two lanes that do their work in any order that their waits allow.

use std::collections::HashMap;

use candle_core::DType;

use super::*;
use crate::streaming::Form;

/// What the lanes do; copying and computing take their time.
#[derive(Debug, Clone, PartialEq)]
enum Work {
    Take(usize),
    GiveBack(usize),
    /// To a place, of which value.
    BeginCopy(usize),
    EndCopy(usize, u8),
    /// Of a layer: its places, and what they must hold.
    BeginLayer(usize, Vec<(usize, u8)>),
    EndLayer(Vec<(usize, u8)>),
    Reach(usize),
    Await(usize),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Lane {
    Copies,
    Computation,
}

/// A GPU that begins nothing before the host has said all.
#[derive(Default)]
struct Queues {
    copies: VecDeque<Work>,
    computation: VecDeque<Work>,
    /// Bytes of all places there ever were.
    bytes: Vec<usize>,
    marks: usize,
}

#[derive(Clone, Default)]
struct Late {
    queues: Arc<Mutex<Queues>>,
    /// A lane that waits for nothing.
    careless: Option<Lane>,
}

impl Late {
    fn add(&self, lane: Lane, work: Work) {
        let mut queues = self.queues.lock().unwrap();
        match lane {
            Lane::Copies => queues.copies.push_back(work),
            Lane::Computation => queues.computation.push_back(work),
        }
    }

    fn wait(&self, lane: Lane, mark: usize) {
        if self.careless != Some(lane) {
            self.add(lane, Work::Await(mark));
        }
    }

    fn mark(&self, lane: Lane) -> usize {
        let mark = {
            let mut queues = self.queues.lock().unwrap();
            queues.marks += 1;
            queues.marks
        };
        self.add(lane, Work::Reach(mark));
        mark
    }
}

struct Memory {
    number: usize,
    gpu: Late,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.gpu.add(Lane::Computation, Work::GiveBack(self.number));
    }
}

impl Lanes for Late {
    type Place = Arc<Memory>;
    type Mark = usize;

    fn place(&self, spec: &Spec) -> Result<Self::Place> {
        let number = {
            let mut queues = self.queues.lock().unwrap();
            queues.bytes.push(spec.bytes());
            queues.bytes.len() - 1
        };
        self.add(Lane::Computation, Work::Take(number));
        Ok(Arc::new(Memory { number, gpu: self.clone() }))
    }

    fn send(&self, place: &Self::Place, source: Source<'_>) -> Result<()> {
        let Source::Pieces(&[&[value, ..], ..]) = source else { bail!("nothing to send") };
        self.add(Lane::Copies, Work::BeginCopy(place.number));
        self.add(Lane::Copies, Work::EndCopy(place.number, value));
        Ok(())
    }

    fn copied(&self) -> Result<usize> {
        Ok(self.mark(Lane::Copies))
    }

    fn computed(&self) -> Result<usize> {
        Ok(self.mark(Lane::Computation))
    }

    fn copy_after(&self, mark: &usize) -> Result<()> {
        self.wait(Lane::Copies, *mark);
        Ok(())
    }

    fn compute_after(&self, mark: &usize) -> Result<()> {
        self.wait(Lane::Computation, *mark);
        Ok(())
    }

    fn pin(&self, _: &[&[u8]]) -> Option<Pinned> {
        None
    }
}

/// The GPU at work: what its memory holds.
struct Run {
    queues: Queues,
    reached: Vec<bool>,
    /// Of places that are taken; no value while none is there or one is on its way.
    memory: HashMap<usize, Option<u8>>,
    most: usize,
    computing: Option<usize>,
}

impl Run {
    fn of(gpu: &Late) -> Self {
        let queues = mem::take(&mut *gpu.queues.lock().unwrap());
        let reached = vec![false; queues.marks + 1];
        Self { queues, reached, memory: HashMap::new(), most: 0, computing: None }
    }

    fn queue(&mut self, lane: Lane) -> &mut VecDeque<Work> {
        match lane {
            Lane::Copies => &mut self.queues.copies,
            Lane::Computation => &mut self.queues.computation,
        }
    }

    /// Does the next thing of a lane, if there is one that need not wait.
    fn advance(&mut self, lane: Lane) -> bool {
        let Some(work) = self.queue(lane).front().cloned() else { return false };
        match work {
            Work::Await(mark) if !self.reached[mark] => return false,
            Work::Await(_) => {}
            Work::Reach(mark) => self.reached[mark] = true,
            Work::Take(place) => {
                assert!(self.memory.insert(place, None).is_none());
                let bytes: usize = self.memory.keys().map(|&place| self.queues.bytes[place]).sum();
                self.most = self.most.max(bytes);
            }
            Work::GiveBack(place) => assert!(self.memory.remove(&place).is_some()),
            Work::BeginCopy(place) => self.write(place, None),
            Work::EndCopy(place, value) => self.write(place, Some(value)),
            Work::BeginLayer(layer, places) => {
                self.check(&places);
                self.computing = Some(layer);
            }
            Work::EndLayer(places) => {
                self.check(&places);
                self.computing = None;
            }
        }
        self.queue(lane).pop_front();
        true
    }

    fn write(&mut self, place: usize, value: Option<u8>) {
        let held = self.memory.get_mut(&place).expect("a copy to memory that is not taken");
        *held = value;
    }

    fn check(&self, places: &[(usize, u8)]) {
        for (place, value) in places {
            assert_eq!(self.memory.get(place), Some(&Some(*value)), "place {place} has not the layer's values");
        }
    }

    /// To the end; `first` says which lane goes on while both can.
    fn finish(mut self, mut first: impl FnMut() -> Lane) -> Self {
        while !(self.queues.copies.is_empty() && self.queues.computation.is_empty()) {
            let lane = first();
            let other = if lane == Lane::Copies { Lane::Computation } else { Lane::Copies };
            assert!(self.advance(lane) || self.advance(other), "the lanes wait for each other");
        }
        self
    }
}

fn spec(form: Form, values: usize) -> Spec {
    Spec { form, shape: vec![values] }
}

fn dense(values: usize) -> Spec {
    spec(Form::Dense(DType::BF16), values)
}

fn bytes(layer: &[Spec]) -> usize {
    layer.iter().map(Spec::bytes).sum()
}

fn put(layer: &mut Layer<Late>, spec: &Spec, value: u8) -> Result<Arc<Memory>> {
    layer.put(spec.clone(), Source::Pieces(&[&vec![value; spec.bytes()]]))
}

/// Says to a GPU what a pass over `layers` is, as two threads do that hand over layers: the next one's copies are said before
/// or after the computation that they run beside. Values are the layers' numbers, from `first` on.
fn pass(slots: &Slots<Late>, gpu: &Late, layers: &[Vec<Spec>], first: usize, copies_are_said_first: bool) {
    let send = |i: usize| {
        let mut layer = slots.begin().unwrap();
        let value = (first + i) as u8;
        let places: Vec<_> =
            layers[i].iter().map(|spec| (put(&mut layer, spec, value).unwrap().number, value)).collect();
        layer.finish().unwrap();
        (layer, places)
    };
    let mut next = Some(send(0));
    for i in 0..layers.len() {
        let (mut layer, places) = next.take().unwrap();
        let following = || (i + 1 < layers.len()).then(|| send(i + 1));
        if copies_are_said_first {
            next = following();
        }
        layer.arrive().unwrap();
        gpu.add(Lane::Computation, Work::BeginLayer(first + i, places.clone()));
        gpu.add(Lane::Computation, Work::EndLayer(places));
        if !copies_are_said_first {
            next = following();
        }
    }
}

/// Two kinds of layers, one of which comes in two mixtures of types.
fn layers() -> Vec<Vec<Spec>> {
    let double = vec![dense(600), dense(30), dense(500), dense(30), dense(8)];
    let single = vec![dense(400), dense(20), dense(300), dense(8)];
    let mixed = vec![dense(400), dense(20), spec(Form::Dense(DType::F32), 300), dense(8)];
    [vec![double; 3], vec![single.clone(), mixed, single.clone(), single]].concat()
}

#[test]
fn layers_compute_with_their_own_values_however_late_copies_or_computation_are() {
    for copies_are_said_first in [false, true] {
        for seed in 0..200_u64 {
            let gpu = Late::default();
            let slots = Slots::new(gpu.clone());
            let layers = layers();
            for step in 0..3 {
                pass(&slots, &gpu, &layers, step * layers.len(), copies_are_said_first);
            }
            drop(slots);
            let mut state = seed;
            let ended = Run::of(&gpu).finish(|| match seed {
                0 => Lane::Copies,
                1 => Lane::Computation,
                _ => {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    if state >> 63 == 0 { Lane::Copies } else { Lane::Computation }
                }
            });
            assert!(ended.memory.is_empty(), "all memory is given back");
            // Those that are neighbours in a pass, and the last of one with the first of the next.
            let neighbours = layers.iter().zip(layers.iter().cycle().skip(1));
            let two = neighbours.map(|(a, b)| bytes(a) + bytes(b)).max().unwrap();
            assert!(ended.most <= two, "{} bytes where two layers have {two}", ended.most);
        }
    }
}

#[test]
#[should_panic(expected = "has not the layer's values")]
fn a_computation_that_does_not_wait_for_copies_is_noticed() {
    let gpu = Late { careless: Some(Lane::Computation), ..Late::default() };
    let slots = Slots::new(gpu.clone());
    pass(&slots, &gpu, &layers(), 0, true);
    Run::of(&gpu).finish(|| Lane::Computation);
}

#[test]
#[should_panic(expected = "has not the layer's values")]
fn copies_that_do_not_wait_for_the_computation_are_noticed() {
    let gpu = Late { careless: Some(Lane::Copies), ..Late::default() };
    let slots = Slots::new(gpu.clone());
    pass(&slots, &gpu, &vec![vec![dense(400), dense(20)]; 6], 0, true);
    let mut run = Run::of(&gpu);
    // So far that both slots have their places, and no further: the copies go over what is to be computed with.
    while run.memory.len() < 4 {
        assert!(run.advance(Lane::Computation) || run.advance(Lane::Copies));
    }
    run.finish(|| Lane::Copies);
}

#[test]
fn a_layer_is_there_before_the_one_before_it_ends() {
    let gpu = Late::default();
    let slots = Slots::new(gpu.clone());
    let layers = vec![vec![dense(400), dense(20)]; 6];
    pass(&slots, &gpu, &layers, 0, false);
    let places = gpu.queues.lock().unwrap().bytes.len();
    assert_eq!(places, 4, "two slots, whose places are used again");
    let mut run = Run::of(&gpu);
    for layer in 0..6 {
        while run.computing != Some(layer) {
            assert!(run.advance(Lane::Computation) || run.advance(Lane::Copies), "no way to layer {layer}");
        }
        // Now it computes, and the copies go as far as they can.
        while run.advance(Lane::Copies) {}
        let held = run.memory.values().flatten().filter(|&&value| value == layer as u8 + 1).count();
        // The places of the first two layers are taken when the computation comes there.
        if (1..5).contains(&layer) {
            assert_eq!(held, 2, "layer {} beside {layer}", layer + 1);
        }
    }
}

#[test]
fn a_lone_layer_has_one_slot() {
    let gpu = Late::default();
    let slots = Slots::new(gpu.clone());
    for step in 0..3 {
        pass(&slots, &gpu, &[vec![dense(400), dense(20)]], step, false);
    }
    drop(slots);
    assert_eq!(Run::of(&gpu).finish(|| Lane::Copies).most, 840);
}

#[test]
fn a_third_layer_is_refused_and_one_that_nobody_computed_with_makes_room() {
    let gpu = Late::default();
    let slots = Slots::new(gpu.clone());
    let send = |value: u8| {
        let mut layer = slots.begin()?;
        put(&mut layer, &dense(10), value)?;
        Ok::<_, candle_core::Error>(layer)
    };
    let (first, _second) = (send(1).unwrap(), send(2).unwrap());
    assert!(send(3).is_err());
    drop(first); // neither finished nor computed, as after a failure
    let mut third = send(3).unwrap();
    assert!(third.put(dense(10), Source::Pieces(&[&[0; 20], &[0]])).is_err(), "more than there is room for");
    drop((third, _second, slots));
    let ended = Run::of(&gpu).finish(|| Lane::Computation);
    assert!(ended.memory.is_empty());
}
