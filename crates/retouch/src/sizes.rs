//! Which sizes an edit works at.

use retouch_models::Sizes;

use crate::{Error, OutputSize, ReferenceSize, Result};

/// Width and height in pixels.
pub type Size = (usize, usize);

/// Largest output or reference image, in pixels: four times the model's usual megapixel, in each direction.
const MAX_AREA: usize = 4096 * 4096;

/// The sizes of one model.
pub struct SizeRules<'a> {
    pub sizes: &'a Sizes,
    /// Widths and heights must be multiples of this: the VAE's factor times the 2x2 patch of a token.
    pub multiple: usize,
}

impl SizeRules<'_> {
    /// The size at which the model sees a source image of size `image`.
    ///
    /// A model without preferred sizes was trained on references of its result's size: of a larger one it makes a part.
    pub fn reference(&self, wanted: ReferenceSize, image: Size, output: OutputSize) -> Result<Size> {
        let size = match wanted {
            ReferenceSize::Exact { width, height } => self.exact("reference size", (width, height))?,
            ReferenceSize::Keep => self.not_empty(image, self.floor(image))?,
            ReferenceSize::Auto => match self.sizes {
                // The reference takes the aspect after flooring.
                Sizes::Preferred(sizes) => nearest_aspect(sizes, aspect(self.not_empty(image, self.floor(image))?)),
                Sizes::KeepUpToArea(area) => {
                    let area = match output {
                        OutputSize::Exact { width, height } => {
                            let (width, height) = self.exact("size", (width, height))?;
                            (*area).min(width.saturating_mul(height))
                        }
                        _ => *area,
                    };
                    let (width, height) = shrink(image, area);
                    // A narrow image is not too narrow for being shrunk.
                    let at_least = |side: usize, of: usize| side.max(self.multiple.min(of));
                    let size = (at_least(width, image.0), at_least(height, image.1));
                    self.not_empty(image, self.floor(size))?
                }
            },
        };
        self.bounded("reference image", size)
    }

    fn not_empty(&self, image: Size, size: Size) -> Result<Size> {
        if size.0 == 0 || size.1 == 0 {
            return Err(Error::BadRequest(format!(
                "the image is {}x{} pixels, too small or too narrow: the model sees multiples of {m} pixels, {m}x{m} at least",
                image.0,
                image.1,
                m = self.multiple
            )));
        }
        Ok(size)
    }

    /// The size of the result, given the reference's size.
    pub fn output(&self, wanted: OutputSize, reference: Option<Size>) -> Result<Size> {
        let size = match wanted {
            OutputSize::Exact { width, height } => self.exact("size", (width, height))?,
            OutputSize::Auto => reference.unwrap_or_else(|| self.of_aspect(1.0, None)),
            OutputSize::Aspect(ratio) => {
                if !(ratio.is_finite() && (1.0 / 64.0..=64.0).contains(&ratio)) {
                    return Err(Error::BadRequest(format!(
                        "the aspect ratio {ratio} is not usable; give one from 1:64 to 64:1"
                    )));
                }
                self.of_aspect(ratio, reference)
            }
            OutputSize::Diffusers { width, height } => {
                let (width, height) = (width.unwrap_or(1024), height.unwrap_or(1024));
                if width == 0 || height == 0 {
                    return Err(Error::BadRequest(format!("the size {width}x{height} is empty")));
                }
                self.of_area(1024 * 1024, width as f64 / height as f64)
            }
        };
        self.bounded("result", size)
    }

    fn of_aspect(&self, ratio: f64, reference: Option<Size>) -> Size {
        match self.sizes {
            Sizes::Preferred(sizes) => nearest_aspect(sizes, ratio),
            Sizes::KeepUpToArea(area) => self.of_area(reference.map_or(*area, |(w, h)| w * h), ratio),
        }
    }

    /// About `area` pixels of width over height `ratio`; the rule of diffusers' pipeline.
    fn of_area(&self, area: usize, ratio: f64) -> Size {
        let side = |x: f64| x.sqrt().round_ties_even() as usize;
        let (width, height) = self.floor((side(area as f64 * ratio), side(area as f64 / ratio)));
        (width.max(self.multiple), height.max(self.multiple))
    }

    fn floor(&self, (width, height): Size) -> Size {
        (width / self.multiple * self.multiple, height / self.multiple * self.multiple)
    }

    fn exact(&self, what: &str, (width, height): Size) -> Result<Size> {
        if width == 0 || height == 0 || !width.is_multiple_of(self.multiple) || !height.is_multiple_of(self.multiple) {
            let near = |x: usize| ((x + self.multiple / 2) / self.multiple).max(1).saturating_mul(self.multiple);
            return Err(Error::BadRequest(format!(
                "the {what} {width}x{height} is not usable: both must be multiples of {}, e.g. {}x{}",
                self.multiple,
                near(width.min(4096)),
                near(height.min(4096))
            )));
        }
        Ok((width, height))
    }

    fn bounded(&self, what: &str, (width, height): Size) -> Result<Size> {
        if width.checked_mul(height).is_none_or(|area| area > MAX_AREA) {
            return Err(Error::BadRequest(format!(
                "the {what} would have {width}x{height} pixels; the most that is taken is {MAX_AREA} pixels (4096x4096)"
            )));
        }
        Ok((width, height))
    }
}

fn aspect((width, height): Size) -> f64 {
    width as f64 / height as f64
}

/// The size with the nearest width over height; of equally near ones the narrowest.
fn nearest_aspect(sizes: &[Size], ratio: f64) -> Size {
    let distance = |&size: &Size| (ratio - aspect(size)).abs();
    sizes.iter().copied().min_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.cmp(b))).unwrap_or((1024, 1024))
}

/// Scales down to at most `area` pixels.
fn shrink((width, height): Size, area: usize) -> Size {
    let scale = (area as f64 / (width as f64 * height as f64)).sqrt().min(1.0);
    ((width as f64 * scale) as usize, (height as f64 * scale) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NANO: Sizes = Sizes::KeepUpToArea(512 * 512);

    fn rules(sizes: &Sizes) -> SizeRules<'_> {
        SizeRules { sizes, multiple: 16 }
    }

    #[test]
    fn small_images_keep_their_size_and_large_ones_their_aspect() -> Result<()> {
        let reference = |image, output| rules(&NANO).reference(ReferenceSize::Auto, image, output);
        assert_eq!(reference((300, 200), OutputSize::Auto)?, (288, 192));
        assert_eq!(reference((512, 512), OutputSize::Auto)?, (512, 512));
        assert_eq!(reference((4000, 2000), OutputSize::Auto)?, (720, 352));
        let exact = |width, height| OutputSize::Exact { width, height };
        assert_eq!(reference((512, 512), exact(256, 256))?, (256, 256));
        assert_eq!(reference((300, 200), exact(512, 512))?, (288, 192));
        Ok(())
    }

    #[test]
    fn the_result_has_the_reference_size_unless_asked_otherwise() -> Result<()> {
        let rules = rules(&NANO);
        assert_eq!(rules.output(OutputSize::Auto, Some((288, 192)))?, (288, 192));
        assert_eq!(rules.output(OutputSize::Auto, None)?, (512, 512));
        assert_eq!(rules.output(OutputSize::Exact { width: 64, height: 32 }, Some((288, 192)))?, (64, 32));
        assert_eq!(rules.output(OutputSize::Aspect(4.0), Some((256, 256)))?, (512, 128));
        Ok(())
    }

    #[test]
    fn references_get_the_size_that_diffusers_gives_them() {
        #[derive(serde::Deserialize)]
        struct Case {
            width: usize,
            height: usize,
            /// None where the image is too small.
            diffusers: Option<Size>,
            keep: Option<Size>,
        }
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/small/buckets.json");
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let kontext = retouch_models::defaults_for("FluxKontextPipeline").sizes;
        let rules = rules(&kontext);
        assert!(cases.len() > 40);
        for Case { width, height, diffusers, keep } in cases {
            let found = |rule| rules.reference(rule, (width, height), OutputSize::Auto).ok();
            assert_eq!(found(ReferenceSize::Auto), diffusers, "{width}x{height}");
            assert_eq!(found(ReferenceSize::Keep), keep, "{width}x{height}");
        }
    }

    #[test]
    fn the_reference_rule_gives_its_odd_sizes() -> Result<()> {
        // A known surprise of the reference: 672x1568 asked, 656x1552 made.
        let size = OutputSize::Diffusers { width: Some(672), height: Some(1568) };
        assert_eq!(rules(&NANO).output(size, None)?, (656, 1552));
        assert_eq!(rules(&NANO).output(OutputSize::Diffusers { width: None, height: None }, None)?, (1024, 1024));
        Ok(())
    }

    #[test]
    fn impossible_sizes_are_refused_with_a_way_out() {
        let rules = rules(&NANO);
        for (width, height) in [(0, 16), (17, 32), (100_000, 100_000), (usize::MAX / 16 * 16, 16)] {
            let refused = rules.output(OutputSize::Exact { width, height }, None);
            assert!(matches!(refused, Err(Error::BadRequest(_))), "{width}x{height}");
        }
        assert!(rules.output(OutputSize::Aspect(f64::NAN), None).is_err());
        assert!(rules.reference(ReferenceSize::Auto, (1, 1), OutputSize::Auto).is_err());
        assert!(rules.reference(ReferenceSize::Keep, (4000, 15), OutputSize::Auto).is_err());
    }
}
