//! A profile as a table.

use std::time::Duration;

use retouch::Profile;

/// Lines of at most 80 characters: stages, and under each its operations, with what is left of the machine's speed.
pub fn table(profile: &Profile) -> Vec<String> {
    let peak = profile.peak_flops;
    let mut lines = vec![format!(
        "{:<24}{:>7}{:>10}{:>10}{:>10}{:>9}{:>9}",
        "", "calls", "seconds", "TFLOP", "TFLOP/s", "GB/s", "of floor"
    )];
    let mut line = |name: &str, calls: Option<u64>, time: Duration, flops: f64, bytes: Option<f64>| {
        let seconds = time.as_secs_f64();
        let share = |value: f64, unit: &str, digits: usize| {
            if value > 0.0 && seconds > 0.0 { format!("{value:.digits$}{unit}") } else { String::new() }
        };
        lines.push(
            format!(
                "{name:<24}{:>7}{seconds:>10.4}{:>10}{:>10}{:>9}{:>9}",
                calls.map(|calls| calls.to_string()).unwrap_or_default(),
                share(flops / 1e12, "", 4),
                share(flops / 1e12 / seconds, "", 3),
                share(bytes.unwrap_or(0.0) / 1e9 / seconds, "", 1),
                share(100.0 * flops / peak / seconds, " %", 0),
            )
            .trim_end()
            .to_string(),
        );
    };
    let (mut time, mut flops) = (Duration::ZERO, 0.0);
    for stage in &profile.stages {
        line(stage.name, None, stage.time, stage.flops(), Some(stage.read as f64));
        for (operation, total) in &stage.operations {
            line(&format!("  {operation}"), Some(total.calls), total.time, total.flops, Some(total.bytes));
        }
        line("  outside of operations", None, stage.outside(), 0.0, None);
        time += stage.time;
        flops += stage.flops();
    }
    line("all", None, time, flops, None);
    lines.push("GB/s of a stage: weights read; of an operation: its inputs and outputs".to_string());
    lines.push(format!(
        "floor: {:.3} s for all products at {:.3} TFLOP/s, a linear layer's best here",
        flops / peak,
        peak / 1e12
    ));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_at_the_machines_full_speed_is_at_its_floor() {
        let stage = retouch::StageProfile { name: "steps", time: Duration::from_secs(2), read: 0, operations: vec![] };
        let mut profile = Profile { stages: vec![stage], peak_flops: 1e12 };
        assert!(table(&profile).iter().all(|line| !line.contains('%')), "no products, no share");
        let total = retouch::Total { calls: 3, time: Duration::from_secs(1), flops: 1e12, bytes: 4e9 };
        profile.stages[0].operations.push((retouch::Operation::Linear, total));
        let lines = table(&profile);
        let of = |name: &str| lines.iter().find(|line| line.trim_start().starts_with(name)).unwrap().as_str();
        assert!(of("linear").ends_with("4.0    100 %"), "{}", of("linear"));
        assert!(of("steps").ends_with("50 %"), "{}", of("steps"));
        profile.stages[0].read = 3_000_000_000;
        assert!(table(&profile)[1].contains(" 1.5 "), "3 GB in 2 s: {}", table(&profile)[1]);
        assert!(of("outside").contains("1.0000"), "{}", of("outside"));
        assert!(lines.iter().all(|line| line.len() <= 80));
    }
}
