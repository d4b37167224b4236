//! `retouch plan`: what an edit would keep in memory, without running it.

use retouch::{
    DeviceChoice, MemoryPlan, Precision, Stage,
    memory::{BUS, Budget, DeviceKind, ModelMemory, StagePlan, Work},
};
use serde_json::json;

use crate::{
    args::{Bytes, PlanArgs, PlanRunArgs},
    console::Console,
    failure::{Failure, Result},
};

pub fn run(args: &PlanArgs, console: &Console) -> Result<()> {
    let PlanRunArgs { device, dtype, keep_loaded, encoders, vram_limit } = args.run;
    let budget = Budget::on(device.unwrap_or(DeviceChoice::Auto), vram_limit.map(|Bytes(bytes)| bytes))?;
    let usual = if budget.kind == DeviceKind::Cpu { Precision::F32 } else { Precision::Bf16 };
    let precision = dtype.unwrap_or(usual);
    let source = args.model.source(Default::default());
    let (model, work) = ModelMemory::find(&source, args.target, precision)?;
    let side = |side: Option<u32>, usual: usize| side.map_or(usual, |side| side as usize);
    let output = (side(args.width, work.output.0), side(args.height, work.output.1));
    let reference = args.reference_size.map_or(Some(output), |reference| reference.0);
    let (images, prompts) = (args.num_images as usize, 1 + usize::from(args.true_cfg));
    let keep_loaded = keep_loaded.into();
    let work = Work { output, reference, images, prompts, keep_loaded, encoders, ..work };
    let plan = MemoryPlan::fastest(&model, &work, budget)?;
    let name = source.base.as_deref().unwrap_or("the model");
    let text = if args.json { json(&plan, &work)? } else { table(&plan, &work, name, precision) };
    console.write(text.as_bytes())
}

fn name(stage: Stage) -> &'static str {
    match stage {
        Stage::TextEncoders => "text encoders",
        Stage::VaeEncoder => "reading the image",
        Stage::Transformer => "transformer",
        Stage::VaeDecoder => "making the pixels",
    }
}

fn table(plan: &MemoryPlan, work: &Work, model: &str, precision: Precision) -> String {
    let size = |(width, height): (usize, usize)| format!("{width}x{height}");
    let from = work.reference.map_or("from words alone".to_string(), |reference| format!("from {}", size(reference)));
    let (output, kind, steps) = (size(work.output), plan.budget.kind, work.steps);
    let gigabytes = |bytes: u64| if bytes == 0 { "-".to_string() } else { format!("{:.2} GB", bytes as f64 / 1e9) };
    let mut lines = vec![
        format!("{model}: {output} {from}, {steps} steps, {precision} on {kind}"),
        format!("{:<20}{:>12}{:>12}{:>16}", "stage", "resident", "peak", "read per pass"),
    ];
    lines.extend(plan.stages.iter().map(|stage| {
        let StagePlan { stage, device, resident, peak, read_per_pass } = *stage;
        let elsewhere = if device == kind { String::new() } else { format!(" ({device})") };
        let name = format!("{}{elsewhere}", name(stage));
        let (resident, peak, read) = (gigabytes(resident), gigabytes(peak), gigabytes(read_per_pass));
        format!("{name:<20}{resident:>12}{peak:>12}{read:>16}")
    }));
    lines.extend(plan.transfer.map(|transfer| transfer.to_string()));
    lines.push(plan.to_string());
    lines.join("\n") + "\n"
}

fn json(plan: &MemoryPlan, work: &Work) -> Result<String> {
    let stages = plan.stages.iter().map(|stage| {
        let StagePlan { stage, device, resident, peak, read_per_pass } = *stage;
        let device = device.to_string();
        json!({"stage": name(stage), "device": device, "resident": resident, "peak": peak, "read_per_pass": read_per_pass})
    });
    let transfer = plan.transfer.map(|transfer| {
        json!({
            "bytes": transfer.bytes,
            "pinned": transfer.pinned,
            "bus_bytes_per_second": BUS,
            "seconds": transfer.seconds(),
            "flops": transfer.flops,
            "hidden_below_flops_per_second": transfer.hidden_below,
        })
    });
    let (width, height) = work.output;
    let value = json!({
        "width": width,
        "height": height,
        "device": plan.budget.kind.to_string(),
        "available": plan.budget.device,
        "peak": plan.peak(),
        "plan": plan.to_string(),
        "stages": stages.collect::<Vec<_>>(),
        "transfer": transfer,
    });
    serde_json::to_string(&value).map(|json| json + "\n").map_err(|e| Failure::Failed(e.to_string()))
}
