"""Which modules' outputs go into deep.safetensors, so that a mismatch can be located.

All are from the first call of each module (first step, batch 1), in the reference's own layout:
`clip.*` [1, 77, hidden], `t5.*` [1, tokens, hidden], `transformer.*` [1, tokens, hidden] (`.txt` and `.img` are the two
streams; the image stream is output tokens, then reference tokens), `vae.*` [1, channels, height, width].
"""


def watched_modules(pipe):
    """Yields (name, module, names of the elements of its result); an element named None is not kept."""
    clip = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    yield "clip.embeddings", clip.embeddings, [""]
    for i, layer in enumerate(clip.encoder.layers):
        yield f"clip.layer.{i}", layer, [""]
    yield "clip.final_norm", clip.final_layer_norm, [""]

    t5 = pipe.text_encoder_2
    yield "t5.embeddings", t5.encoder.embed_tokens, [""]
    for i, block in enumerate(t5.encoder.block):
        yield f"t5.block.{i}", block, ["", *[None] * 3]
    yield "t5.final_norm", t5.encoder.final_layer_norm, [""]

    flow = pipe.transformer
    yield "transformer.x_embedder", flow.x_embedder, [""]
    yield "transformer.context_embedder", flow.context_embedder, [""]
    yield "transformer.timestep_sinusoid", flow.time_text_embed.time_proj, [""]
    yield "transformer.timestep_embedder", flow.time_text_embed.timestep_embedder, [""]
    yield "transformer.guidance_embedder", flow.time_text_embed.guidance_embedder, [""]
    yield "transformer.text_embedder", flow.time_text_embed.text_embedder, [""]
    yield "transformer.temb", flow.time_text_embed, [""]
    yield "transformer.rotary", flow.pos_embed, [".cos", ".sin"]
    double, single = flow.transformer_blocks[0], flow.single_transformer_blocks[0]
    yield "transformer.double.0.norm1", double.norm1, ["", ".gate_msa", ".shift_mlp", ".scale_mlp", ".gate_mlp"]
    yield "transformer.double.0.attn", double.attn, [".img", ".txt"]
    for i, block in enumerate(flow.transformer_blocks):
        yield f"transformer.double.{i}", block, [".txt", ".img"]
    yield "transformer.single.0.attn", single.attn, [""]
    for i, block in enumerate(flow.single_transformer_blocks):
        yield f"transformer.single.{i}", block, [".txt", ".img"]
    yield "transformer.norm_out", flow.norm_out, [""]
    yield "transformer.proj_out", flow.proj_out, [""]

    for side, levels in (("encoder", "down"), ("decoder", "up")):
        part = getattr(pipe.vae, side)
        yield f"vae.{side}.conv_in", part.conv_in, [""]
        yield f"vae.{side}.mid.attn", part.mid_block.attentions[0], [""]
        yield f"vae.{side}.mid", part.mid_block, [""]
        for i, block in enumerate(getattr(part, f"{levels}_blocks")):
            yield f"vae.{side}.{levels}.{i}", block, [""]
        yield f"vae.{side}.conv_out", part.conv_out, [""]


def watch(pipe, recorder):
    """Hooks every watched module; the recorder keeps the first result of each."""

    def keeper(name, parts):
        def after(result, _args, _kwargs):
            results = result if isinstance(result, (tuple, list)) else (result,)
            for part, tensor in zip(parts, results):
                if part is not None and tensor is not None:
                    recorder.keep(name + part, tensor)

        return after

    for name, module, parts in watched_modules(pipe):
        recorder.hook(module, keeper(name, parts))
