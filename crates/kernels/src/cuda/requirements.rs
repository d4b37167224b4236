//! What a driver and a GPU must have to run this program.

/// The oldest generation with tensor cores for bf16 and asynchronous copies.
pub const OLDEST: (i32, i32) = (8, 0);

/// The oldest generation whose tensor cores take 8-bit floats.
const OLDEST_WITH_FP8: (i32, i32) = (8, 9);

/// Whether a driver takes the PTX of the toolkit `built_with`; `version` as the driver says it: 13000 is 13.0.
pub fn check_driver(version: i32, built_with: &str) -> Result<(), String> {
    let here = (version / 1000, version % 1000 / 10);
    let needed = built_with.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    match needed {
        Some(needed) if here < needed => Err(format!(
            "its driver is for CUDA {}.{} and this program was built with CUDA {built_with}: install a newer driver, or build \
             with an older toolkit",
            here.0, here.1
        )),
        _ => Ok(()),
    }
}

/// Whether candle's kernels and ours run on `name`. PTX for 9.0 and newer is that generation's alone.
pub fn check_capability(name: &str, (major, minor): (i32, i32), built_for: Option<&str>) -> Result<(), String> {
    if (major, minor) < OLDEST {
        return Err(format!(
            "{name} has compute capability {major}.{minor}, and 8.0 (RTX 30, A100) is needed; use --device cpu"
        ));
    }
    let here = 10 * major + minor;
    let built_for = built_for.and_then(|cap| cap.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok());
    match built_for {
        Some(built_for) if here < built_for || (built_for >= 90 && here != built_for) => Err(format!(
            "{name} has compute capability {major}.{minor} and this program was built for {}.{}: build it with \
             CUDA_COMPUTE_CAP={here}",
            built_for / 10,
            built_for % 10
        )),
        _ => Ok(()),
    }
}

/// Whether `name` multiplies 8-bit floats.
pub fn check_fp8(name: &str, (major, minor): (i32, i32)) -> Result<(), String> {
    if (major, minor) >= OLDEST_WITH_FP8 {
        return Ok(());
    }
    Err(format!(
        "{name} has compute capability {major}.{minor}, and products of 8-bit floats need 8.9 (RTX 40, H100) or newer; use \
         --dtype bf16, with --quantize fp8_scaled to hold weights in 8 bits"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_must_be_as_new_as_the_toolkit() {
        assert!(check_driver(13000, "13.0").is_ok() && check_driver(13010, "12.8").is_ok());
        let error = check_driver(12080, "13.0").unwrap_err();
        assert!(error.contains("CUDA 12.8") && error.contains("CUDA 13.0"), "{error}");
    }

    #[test]
    fn a_gpu_without_8_bit_floats_is_refused_with_what_to_do() {
        assert!(check_fp8("it", (8, 9)).is_ok() && check_fp8("it", (9, 0)).is_ok() && check_fp8("it", (12, 0)).is_ok());
        let refusal = check_fp8("NVIDIA A100", (8, 0)).unwrap_err();
        assert!(refusal.contains("NVIDIA A100 has compute capability 8.0") && refusal.contains("--dtype bf16"));
    }

    #[test]
    fn a_gpu_must_run_what_was_built() {
        let check = |capability, built_for| check_capability("it", capability, built_for);
        assert!(check((8, 9), Some("80")).is_ok() && check((12, 0), Some("89")).is_ok() && check((8, 0), None).is_ok());
        assert!(check((9, 0), Some("90")).is_ok() && check((9, 0), Some("90a")).is_ok());
        assert!(check((7, 5), Some("75")).unwrap_err().contains("7.5"));
        assert!(check((8, 6), Some("89")).unwrap_err().contains("CUDA_COMPUTE_CAP=86"));
        assert!(check((12, 0), Some("90a")).unwrap_err().contains("CUDA_COMPUTE_CAP=120"));
    }
}
