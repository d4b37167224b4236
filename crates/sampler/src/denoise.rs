//! The step loop.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use candle_core::{Result, Tensor, bail};

use crate::Schedule;

/// A step that is done.
pub struct Step<'a> {
    /// From 0.
    pub index: usize,
    /// The noise level that the latents are now at.
    pub sigma: f32,
    pub took: Duration,
    pub velocity: &'a Tensor,
    pub latents: &'a Tensor,
}

impl Step<'_> {
    /// Where the velocity leads if it stays as it is: the image that the model expects.
    pub fn denoised(&self) -> Result<Tensor> {
        self.latents - (self.velocity * f64::from(self.sigma))?
    }
}

/// Integrates the flow from noise to image by Euler's method: `x += (sigma_next - sigma) * velocity(x)`.
///
/// `noise` and the result are f32 in any shape; they stay in f32 whatever the model computes in, where the reference
/// rounds them to the model's dtype after every step. `velocity` gets the latents and the step's index. `after` sees
/// every step and may end the loop by [`ControlFlow::Break`]: then there is no result.
///
/// # Errors
/// Those of `velocity`, and latents that are not finite, with the step that made them so.
pub fn denoise(
    noise: Tensor,
    schedule: &Schedule,
    mut velocity: impl FnMut(&Tensor, usize) -> Result<Tensor>,
    mut after: impl FnMut(Step<'_>) -> ControlFlow<()>,
) -> Result<Option<Tensor>> {
    let mut latents = noise;
    for (index, sigmas) in schedule.sigmas().windows(2).enumerate() {
        let start = Instant::now();
        let velocity = velocity(&latents, index)?;
        latents = (latents + (&velocity * f64::from(sigmas[1] - sigmas[0]))?)?;
        // Reading the sum also waits for the device: the time is that of the step, and a cancel acts within it.
        if !latents.sqr()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
            bail!(
                "denoising step {} of {} made latents that are not finite; try --dtype f32, and if that fails as well, \
                 the weights are damaged",
                index + 1,
                schedule.steps()
            )
        }
        let step = Step { index, sigma: sigmas[1], took: start.elapsed(), velocity: &velocity, latents: &latents };
        if after(step).is_break() {
            return Ok(None);
        }
    }
    Ok(Some(latents))
}

/// True classifier-free guidance: from the negative prompt's velocity towards, and past, the positive one's.
///
/// Source: diffusers, `FluxKontextPipeline.__call__`.
pub fn guide(positive: &Tensor, negative: &Tensor, scale: f64) -> Result<Tensor> {
    negative + ((positive - negative)? * scale)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SchedulerConfig;
    use candle_core::Device;

    #[test]
    fn a_straight_flow_arrives_exactly_in_any_number_of_steps() -> Result<()> {
        let noise = Tensor::new(&[3f32, -2.0], &Device::Cpu)?;
        let image = Tensor::new(&[0.5f32, 0.25], &Device::Cpu)?;
        let velocity = (&noise - &image)?;
        for steps in [1, 4, 28] {
            let schedule = Schedule::new(&SchedulerConfig::default(), steps, 64);
            let result = denoise(noise.clone(), &schedule, |_, _| Ok(velocity.clone()), |_| ControlFlow::Continue(()))?;
            let error = (result.unwrap() - &image)?.abs()?.max(0)?.to_scalar::<f32>()?;
            assert!(error < 1e-5, "{steps} steps: {error}");
        }
        Ok(())
    }

    #[test]
    fn latents_that_are_not_finite_end_the_loop_with_the_step_named() -> Result<()> {
        let noise = Tensor::zeros(4, candle_core::DType::F32, &Device::Cpu)?;
        let schedule = Schedule::new(&SchedulerConfig::default(), 4, 64);
        for bad in [f32::NAN, f32::INFINITY] {
            let velocity = |x: &Tensor, step: usize| {
                if step == 1 { Tensor::new(&[0.0, bad, 0.0, 0.0], &Device::Cpu) } else { Ok(x.clone()) }
            };
            let error = denoise(noise.clone(), &schedule, velocity, |_| ControlFlow::Continue(())).unwrap_err();
            assert!(error.to_string().contains("step 2 of 4"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn a_cancelled_loop_stops_at_that_step() -> Result<()> {
        let noise = Tensor::zeros(4, candle_core::DType::F32, &Device::Cpu)?;
        let schedule = Schedule::new(&SchedulerConfig::default(), 10, 64);
        let mut calls = 0;
        let result = denoise(
            noise,
            &schedule,
            |x, _| {
                calls += 1;
                Ok(x.clone())
            },
            |step| if step.index == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) },
        )?;
        assert!(result.is_none());
        assert_eq!(calls, 3);
        Ok(())
    }
}
