//! The noise levels of the steps.
//!
//! Source: diffusers, `FlowMatchEulerDiscreteScheduler.set_timesteps` and `calculate_shift` of the Flux pipelines; the
//! dtypes of the intermediate values are the reference's, so that the sigmas agree bit for bit.

use serde::Deserialize;

/// `scheduler/scheduler_config.json`, as far as flow models use it; what it leaves out is diffusers' own default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    #[serde(rename = "_class_name")]
    pub class: String,
    /// Whether the shift depends on the number of output tokens (dev, Kontext) or is `shift` (schnell).
    pub use_dynamic_shifting: bool,
    pub shift: f64,
    pub base_image_seq_len: usize,
    pub max_image_seq_len: usize,
    pub base_shift: f64,
    pub max_shift: f64,
    pub num_train_timesteps: usize,
    pub time_shift_type: String,
    pub shift_terminal: Option<f64>,
    pub use_karras_sigmas: Option<bool>,
    pub use_exponential_sigmas: Option<bool>,
    pub use_beta_sigmas: Option<bool>,
    pub invert_sigmas: bool,
    pub stochastic_sampling: bool,
}

/// The scheduler of diffusers that this is.
const CLASS: &str = "FlowMatchEulerDiscreteScheduler";

impl Default for SchedulerConfig {
    /// `FlowMatchEulerDiscreteScheduler()` of diffusers: no shift at all.
    fn default() -> Self {
        Self {
            class: CLASS.into(),
            use_dynamic_shifting: false,
            shift: 1.0,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
            base_shift: 0.5,
            max_shift: 1.15,
            num_train_timesteps: 1000,
            time_shift_type: "exponential".into(),
            shift_terminal: None,
            use_karras_sigmas: None,
            use_exponential_sigmas: None,
            use_beta_sigmas: None,
            invert_sigmas: false,
            stochastic_sampling: false,
        }
    }
}

impl SchedulerConfig {
    /// That of FLUX.1 \[dev\] and Kontext \[dev\].
    pub fn flux_dev() -> Self {
        Self { use_dynamic_shifting: true, shift: 3.0, ..Self::default() }
    }

    /// The first setting that this sampler does not implement, if any, with what it does instead.
    pub fn unsupported(&self) -> Option<String> {
        let on = |flag: Option<bool>| flag == Some(true);
        let setting = if self.class != CLASS {
            self.class.as_str()
        } else if on(self.use_karras_sigmas) {
            "use_karras_sigmas"
        } else if on(self.use_exponential_sigmas) {
            "use_exponential_sigmas"
        } else if on(self.use_beta_sigmas) {
            "use_beta_sigmas"
        } else if self.invert_sigmas {
            "invert_sigmas"
        } else if self.stochastic_sampling {
            "stochastic_sampling"
        } else if self.shift_terminal.is_some() {
            "shift_terminal"
        } else if self.time_shift_type != "exponential" {
            "time_shift_type other than \"exponential\""
        } else if self.max_image_seq_len == self.base_image_seq_len {
            "max_image_seq_len equal to base_image_seq_len"
        } else if !(self.shift.is_finite() && self.shift > 0.0) {
            "a shift that is not above 0"
        } else {
            return None;
        };
        Some(format!("{setting} is not supported; FLUX.1 models use flow-matching Euler with an exponential shift"))
    }
}

/// The noise levels of an edit, from 1 (pure noise) to 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    sigmas: Vec<f32>,
    train_timesteps: f32,
}

impl Schedule {
    /// `steps` levels and a final 0, for an output of `tokens` tokens (the reference image's tokens do not count).
    pub fn new(config: &SchedulerConfig, steps: usize, tokens: usize) -> Self {
        let shift = Shift::new(config, tokens);
        let mut sigmas: Vec<f32> = uniform_sigmas(steps).into_iter().map(|sigma| shift.apply(sigma)).collect();
        sigmas.push(0.0);
        Self { sigmas, train_timesteps: config.num_train_timesteps as f32 }
    }

    pub fn steps(&self) -> usize {
        self.sigmas.len() - 1
    }

    /// `steps + 1` levels, the last 0.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The model's time input for each step: sigma times 1000.
    pub fn timesteps(&self) -> Vec<f32> {
        self.sigmas[..self.steps()].iter().map(|sigma| sigma * self.train_timesteps).collect()
    }
}

/// `numpy.linspace(1, 1 / steps, steps)` in f64, rounded to f32.
fn uniform_sigmas(steps: usize) -> Vec<f32> {
    let last = 1.0 / steps as f64;
    let step = if steps > 1 { (last - 1.0) / (steps - 1) as f64 } else { 0.0 };
    (0..steps).map(|i| if i > 0 && i == steps - 1 { last as f32 } else { (i as f64 * step + 1.0) as f32 }).collect()
}

/// Moves the levels towards noise, the more the larger the image.
enum Shift {
    /// e^mu, with mu linear in the number of tokens.
    Exponential(f32),
    Constant(f64),
}

impl Shift {
    fn new(config: &SchedulerConfig, tokens: usize) -> Self {
        if !config.use_dynamic_shifting {
            return Self::Constant(config.shift);
        }
        let (base, max) = (config.base_image_seq_len as f64, config.max_image_seq_len as f64);
        let slope = (config.max_shift - config.base_shift) / (max - base);
        let mu = tokens as f64 * slope + (config.base_shift - slope * base);
        Self::Exponential(mu.exp() as f32)
    }

    fn apply(&self, sigma: f32) -> f32 {
        match self {
            Self::Exponential(e) => e / (e + (1.0 / sigma - 1.0)),
            // The difference is taken before the rounding to f32, as in the reference.
            Self::Constant(shift) => *shift as f32 * sigma / (1.0 + (shift - 1.0) as f32 * sigma),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_step_goes_from_noise_to_image() {
        assert_eq!(Schedule::new(&SchedulerConfig::default(), 1, 4096).sigmas(), [1.0, 0.0]);
    }

    #[test]
    fn larger_images_stay_longer_at_high_noise() {
        let config = SchedulerConfig::flux_dev();
        let small = Schedule::new(&config, 8, 64);
        let large = Schedule::new(&config, 8, 4096);
        assert!(small.sigmas()[1..8].iter().zip(&large.sigmas()[1..8]).all(|(s, l)| s < l));
    }

    #[test]
    fn settings_that_cannot_be_followed_are_refused() {
        let config = SchedulerConfig { use_karras_sigmas: Some(true), ..Default::default() };
        assert!(config.unsupported().is_some_and(|reason| reason.contains("use_karras_sigmas")));
        for shift in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(SchedulerConfig { shift, ..Default::default() }.unsupported().is_some(), "{shift}");
        }
        assert_eq!(SchedulerConfig::default().unsupported(), None);
        assert_eq!(SchedulerConfig::flux_dev().unsupported(), None);
    }
}
