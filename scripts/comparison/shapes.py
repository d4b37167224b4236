"""Names and shapes of a model's tensors in diffusers' layout, from its configurations alone.

shapes_check.py, beside this, holds them to the reference's own modules.
"""


def weight(name, *shape):
    return {f"{name}.weight": shape}


def layer(name, *shape):
    """A weight, and a bias of its first size: a linear layer (outputs, inputs), a norm (channels), a convolution."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def joined(*parts):
    return {name: shape for part in parts for name, shape in part.items()}


def transformer(c):
    head = c["attention_head_dim"]
    hidden, pooled = c["num_attention_heads"] * head, c["pooled_projection_dim"]

    def mlp(name):
        return layer(f"{name}.net.0.proj", 4 * hidden, hidden) | layer(f"{name}.net.2", hidden, 4 * hidden)

    def attention(name, projections, norms):
        return joined(*(layer(f"{name}.{p}", hidden, hidden) for p in projections), *(weight(f"{name}.{n}", head) for n in norms))

    def double_block(name):
        projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        return joined(
            layer(f"{name}.norm1.linear", 6 * hidden, hidden), layer(f"{name}.norm1_context.linear", 6 * hidden, hidden),
            attention(f"{name}.attn", projections, ["norm_q", "norm_k", "norm_added_q", "norm_added_k"]), mlp(f"{name}.ff"), mlp(f"{name}.ff_context"),
        )  # fmt: skip

    def single_block(name):
        return joined(
            layer(f"{name}.norm.linear", 3 * hidden, hidden), layer(f"{name}.proj_mlp", 4 * hidden, hidden),
            layer(f"{name}.proj_out", hidden, 5 * hidden), attention(f"{name}.attn", ["to_q", "to_k", "to_v"], ["norm_q", "norm_k"]),
        )  # fmt: skip

    embedders = {"timestep_embedder": 256, "text_embedder": pooled} | ({"guidance_embedder": 256} if c["guidance_embeds"] else {})
    vectors = (layer(f"time_text_embed.{name}.linear_1", hidden, inputs) | layer(f"time_text_embed.{name}.linear_2", hidden, hidden)
               for name, inputs in embedders.items())
    return joined(
        *vectors, layer("x_embedder", hidden, c["in_channels"]), layer("context_embedder", hidden, c["joint_attention_dim"]),
        *(double_block(f"transformer_blocks.{i}") for i in range(c["num_layers"])),
        *(single_block(f"single_transformer_blocks.{i}") for i in range(c["num_single_layers"])),
        layer("norm_out.linear", 2 * hidden, hidden), layer("proj_out", c["in_channels"], hidden),
    )  # fmt: skip


def text_encoder(c):
    """CLIP's, with the prefix of published files."""
    width, inner = c["hidden_size"], c["intermediate_size"]

    def block(name):
        return joined(
            *(layer(f"{name}.self_attn.{p}_proj", width, width) for p in ("q", "k", "v", "out")), layer(f"{name}.layer_norm1", width),
            layer(f"{name}.mlp.fc1", inner, width), layer(f"{name}.mlp.fc2", width, inner), layer(f"{name}.layer_norm2", width),
        )  # fmt: skip

    return joined(
        weight("text_model.embeddings.token_embedding", c["vocab_size"], width),
        weight("text_model.embeddings.position_embedding", c["max_position_embeddings"], width),
        *(block(f"text_model.encoder.layers.{i}") for i in range(c["num_hidden_layers"])), layer("text_model.final_layer_norm", width),
    )  # fmt: skip


def text_encoder_2(c):
    """T5's."""
    width, inner, mlp = c["d_model"], c["num_heads"] * c["d_kv"], c["d_ff"]

    def block(name):
        attention, dense = f"{name}.layer.0.SelfAttention", f"{name}.layer.1.DenseReluDense"
        return joined(
            *(weight(f"{attention}.{p}", inner, width) for p in "qkv"), weight(f"{attention}.o", width, inner), weight(f"{name}.layer.0.layer_norm", width),
            weight(f"{dense}.wi_0", mlp, width), weight(f"{dense}.wi_1", mlp, width), weight(f"{dense}.wo", width, mlp),
            weight(f"{name}.layer.1.layer_norm", width),
        )  # fmt: skip

    return joined(
        weight("shared", c["vocab_size"], width), *(block(f"encoder.block.{i}") for i in range(c["num_layers"])),
        weight("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", c["relative_attention_num_buckets"], c["num_heads"]),
        weight("encoder.final_layer_norm", width),
    )  # fmt: skip


def vae(c):
    widths, latent, layers = c["block_out_channels"], c["latent_channels"], c["layers_per_block"]
    deepest = widths[-1]

    def residual(name, before, after):
        shortcut = layer(f"{name}.conv_shortcut", after, before, 1, 1) if before != after else {}
        return joined(
            layer(f"{name}.norm1", before), layer(f"{name}.conv1", after, before, 3, 3), layer(f"{name}.norm2", after),
            layer(f"{name}.conv2", after, after, 3, 3), shortcut,
        )  # fmt: skip

    def middle(name):
        attention = f"{name}.attentions.0"
        return joined(
            residual(f"{name}.resnets.0", deepest, deepest), layer(f"{attention}.group_norm", deepest),
            *(layer(f"{attention}.{p}", deepest, deepest) for p in ("to_q", "to_k", "to_v", "to_out.0")), residual(f"{name}.resnets.1", deepest, deepest),
        )  # fmt: skip

    def half(name, kind, sampler, widths, layers, inputs, outputs):
        """Convolution, blocks of residual layers with a change of size after all but the last, convolution."""
        blocks, before = [], widths[0]
        for i, after in enumerate(widths):
            block = f"{name}.{kind}_blocks.{i}"
            blocks += [residual(f"{block}.resnets.{j}", after if j else before, after) for j in range(layers)]
            if i + 1 < len(widths):
                blocks.append(layer(f"{block}.{sampler}.0.conv", after, after, 3, 3))
            before = after
        return joined(
            layer(f"{name}.conv_in", widths[0], inputs, 3, 3), *blocks, middle(f"{name}.mid_block"), layer(f"{name}.conv_norm_out", widths[-1]),
            layer(f"{name}.conv_out", outputs, widths[-1], 3, 3),
        )  # fmt: skip

    return half("encoder", "down", "downsamplers", widths, layers, c["in_channels"], 2 * latent) | half(
        "decoder", "up", "upsamplers", widths[::-1], layers + 1, latent, c["out_channels"]
    )


PARTS = {"transformer": transformer, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "vae": vae}
