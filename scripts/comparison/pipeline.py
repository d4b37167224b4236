"""diffusers' edit, in a process of its own: prints a line of JSON with its times and writes the latents."""
import json
import time

SEED, GUIDANCE, TEXT_TOKENS = 7, 2.5, 512
PROMPTS = ["make it a drawing", "make it night"]   # of the edit before, and of the one that counts


def run(task):
    """`task`: model, image, size, steps, device, dtype, compile (none, blocks or whole), latents (a file to write)."""
    import torch
    from diffusers import FluxKontextPipeline
    from PIL import Image
    from safetensors.torch import save_file

    device, (width, height) = task["device"], task["size"]
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    if device == "cpu":
        torch.set_num_threads(task["threads"])
    start = time.perf_counter()
    pipe = FluxKontextPipeline.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"])).to(device)
    pipe.set_progress_bar_config(disable=True)
    if task["compile"] == "whole":
        pipe.transformer.compile()
    elif task["compile"] == "blocks":
        pipe.transformer.compile_repeated_blocks()
    image = Image.open(task["image"]).convert("RGB")

    def edit(prompt, output):
        ends = []

        def after(_pipe, _step, _time, tensors):
            wait()
            ends.append(time.perf_counter())
            return tensors

        begin = time.perf_counter()
        result = pipe(image=image, prompt=prompt, width=width, height=height, max_area=width * height, _auto_resize=False,
                      num_inference_steps=task["steps"], guidance_scale=GUIDANCE, max_sequence_length=TEXT_TOKENS,
                      generator=torch.Generator().manual_seed(SEED), output_type=output, callback_on_step_end=after)
        wait()
        return result.images, begin, ends, time.perf_counter()

    _, _, ends, _ = edit(PROMPTS[0], "pil")                 # kernels are chosen, and compiled, here
    first_step = ends[0] - start
    _, begin, ends, end = edit(PROMPTS[1], "pil")
    steps = [after - before for before, after in zip(ends, ends[1:])]
    latents, *_ = edit(PROMPTS[1], "latent")
    latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    save_file({"latents": latents.float().cpu().contiguous()}, task["latents"])
    print(json.dumps({"step_seconds": steps, "edit_seconds": end - begin, "first_step_seconds": first_step}))
