//! The tests' numbers.

use std::cell::RefCell;

use candle_core::{Device, Shape, Tensor};
use retouch_sampler::TorchGenerator;

/// Standard normal values in f32 on the CPU. Each test has a thread of its own, so that they are the same at each run.
pub fn random(shape: impl Into<Shape>) -> Tensor {
    thread_local! {
        static GENERATOR: RefCell<TorchGenerator> = RefCell::new(TorchGenerator::new(0));
    }
    let shape = shape.into();
    let values = GENERATOR.with_borrow_mut(|generator| generator.normal(shape.elem_count()));
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}
