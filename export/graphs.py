"""The graphs of a bundle as torch modules."""

from __future__ import annotations

from typing import Any

import torch
from open_clip import transformer as towers
from torch import Tensor, nn
from torch.nn import functional

from export.text_tower import TextTower
from ztune.errors import ConfigError

_MASKED = -1e4  # finite, in fp16 too; its exp is 0


class ImageGraph(nn.Module):
    """Normalised pixels f32[N, 3, S, S] to unit features f32[N, e]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels, normalize=True)
        return features


def visual_tower(model: Any) -> towers.VisionTransformer:
    """Return the image tower to which tokens can be added.

    Raises: ConfigError when it is not open_clip's own ViT.
    """
    tower = model.visual
    # A subclass may differ; the norm of a token must not depend on other tokens.
    plain = type(tower) is towers.VisionTransformer and isinstance(
        tower.ln_pre, nn.LayerNorm | nn.Identity
    )
    if not plain:
        inner = getattr(tower, "trunk", tower)
        raise ConfigError(
            f"image tower {type(inner).__name__} does not support image tokens, which need "
            "open_clip's own VisionTransformer (omit `image_tokens`)"
        )
    assert isinstance(tower, towers.VisionTransformer)
    return tower


class PromptedImageGraph(nn.Module):
    """Normalised pixels f32[N, 3, S, S] and tokens f32[P, n, w] to features f32[P, N, e].

    The tokens follow the class token and the patches, without position embeddings, before the first
    normalisation (BPT-VLM, IJCAI 2023), which is per token, so patches are embedded and normalised
    once for all candidates. Pooling ignores the added tokens.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = visual_tower(model)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        visual: Any = self.visual
        own = visual._embeds(pixels)  # [N, 1 + patches, w]
        n_images, n_own, width = own.shape
        n_candidates, n_added, _ = tokens.shape
        added = visual.ln_pre(tokens).unsqueeze(1)
        rows = torch.cat(
            [
                own.unsqueeze(0).expand(n_candidates, -1, -1, -1),
                added.expand(-1, n_images, -1, -1),
            ],
            2,
        )
        states = visual.transformer(rows.reshape(-1, n_own + n_added, width))
        features, _ = visual._pool(states[:, :n_own])
        if visual.proj is not None:
            features = features @ visual.proj
        return functional.normalize(features, dim=-1).reshape(n_candidates, n_images, -1)


class TextGraph(nn.Module):
    """Token ids i64[B, L] to unit features f32[B, e]: open_clip's own forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(tokens, normalize=True)
        return features


class PrefixGraph(nn.Module):
    """Contexts to text features in a causal tower, without repeated work for candidates or classes.

    T is the number of real tokens of all names (end-of-text included), packed in sequence, n the
    longest name; `pad` and `unpad` convert between the packed rows and the grid [C, n].

    - [SOS] attends only to itself: its keys and values are constants of the graph.
    - The context's rows are computed once per candidate, and only the names' real tokens, together
      [P * m + P * T, d]. Before the first attention the names are the same for every candidate.
    - Only attention uses the grid [P, C, n], where causality masks the padding; one gather of d / h
      values per head copies query, key and value to it.
    - The last layer computes queries, projection and MLP for the end-of-text rows only.
    """

    sos_keys: Tensor
    sos_values: Tensor
    positions: Tensor

    def __init__(self, tower: TextTower, sos_id: int) -> None:
        super().__init__()
        parts = tower.parts
        assert parts is not None
        self.blocks = parts.blocks
        self.ln_final = parts.ln_final
        self.projection = parts.projection
        # No slicing at run time: the last layer has separate weights, which are the only matrices
        # of this graph that `text.onnx` does not have.
        self.projections = nn.ModuleList(
            nn.ModuleDict({kind: _projection(block, kind) for kind in kinds})
            for block, kinds in zip(
                parts.blocks, [("qkv",)] * (len(parts.blocks) - 1) + [("q", "kv")], strict=True
            )
        )
        keys, values = [], []
        with torch.no_grad():
            state = (tower.embedding.weight[sos_id] + parts.positions[0]).reshape(1, -1)
            for block in parts.blocks:
                projected = _projection(block, "kv")(block.ln_1(state))
                key, value = projected.reshape(2, block.attn.num_heads, 1, -1)
                keys.append(key)
                values.append(value)
                # A single row attends to itself, so its value is the output of attention.
                attended = block.attn.out_proj(value.reshape(1, -1))
                state = _after_attention(block, state, attended)
        self.register_buffer("sos_keys", torch.stack(keys).detach())  # [layers, h, 1, d / h]
        self.register_buffer("sos_values", torch.stack(values).detach())
        self.register_buffer("positions", parts.positions.clone())

    def forward(
        self,
        contexts: Tensor,
        name_embeddings: Tensor,
        name_positions: Tensor,
        pad_index: Tensor,
        unpad_index: Tensor,
        eot_index: Tensor,
    ) -> Tensor:
        n_candidates, n_context, width = contexts.shape
        n_classes, n_name = pad_index.shape
        n_rows = name_positions.shape[0]
        n_heads = self.sos_keys.shape[1]
        # Of the products: ONNX Runtime makes it a factor of the kernel, which costs nothing.
        scale = (width // n_heads) ** -0.5
        steps = torch.arange(n_context, device=contexts.device)
        columns = torch.arange(n_name, device=contexts.device)
        heads = torch.arange(n_heads, device=contexts.device)
        candidates = torch.arange(n_candidates, device=contexts.device).reshape(-1, 1)
        # [m, 1 + m]: a context row attends to [SOS] and the context up to itself; [n, n] likewise.
        prefix_mask = _mask(torch.arange(n_context + 1) <= 1 + steps.unsqueeze(1))
        name_mask = _mask(columns <= columns.unsqueeze(1))
        # Rows: the contexts of all candidates, then the names of the first, of the second, ...
        first_name = n_candidates * n_context
        prefix_rows = candidates * n_context + steps  # [P, m]
        grid_rows = first_name + candidates * n_rows + pad_index.reshape(1, -1)  # [P, C * n]
        end_rows = (first_name + candidates * n_rows + eot_index).reshape(-1)  # [P * C]
        # Back to rows [P * T, h], in blocks of d / h values of attended [P, h, C * n, d / h].
        unpad_blocks = (candidates.unsqueeze(2) * n_heads + heads) * (n_classes * n_name)
        unpad_blocks = (unpad_blocks + unpad_index.reshape(1, -1, 1)).reshape(-1)

        prefix = (contexts + self.positions.index_select(0, 1 + steps)).reshape(-1, width)
        names = name_embeddings + self.positions.index_select(0, 1 + n_context + name_positions)
        rows = torch.cat([prefix, names.expand(n_candidates, -1, -1).reshape(-1, width)])
        n_queries = n_name
        for layer, block in enumerate(self.blocks):
            projection: Any = self.projections[layer]
            last = layer == len(self.blocks) - 1
            if last:
                normed = block.ln_1(rows)
                projected = projection["kv"](normed)
                query_of, key_of, value_of, n_parts = -1, 0, 1, 2
            elif layer == 0:
                projected = projection["qkv"](block.ln_1(torch.cat([prefix, names])))
                query_of, key_of, value_of, n_parts = 0, 1, 2, 3
            else:
                projected = projection["qkv"](block.ln_1(rows))
                query_of, key_of, value_of, n_parts = 0, 1, 2, 3
            blocks = projected.reshape(-1, width // n_heads)

            def by_head(
                at: Tensor, part: int, blocks: Tensor = blocks, n_parts: int = n_parts
            ) -> Tensor:
                """Return [P, h, X, d / h] of the rows [P, X], of one part of the projection."""
                index = (at.unsqueeze(1) * n_parts + part) * n_heads + heads.reshape(-1, 1)
                taken = blocks.index_select(0, index.reshape(-1))
                return taken.reshape(n_candidates, n_heads, -1, width // n_heads)

            names_at = grid_rows
            if layer == 0:
                names_at = (first_name + pad_index.reshape(1, -1)).expand(n_candidates, -1)
            name_key, name_value = by_head(names_at, key_of), by_head(names_at, value_of)
            if last:
                rows = rows.index_select(0, end_rows)
                ends = projection["q"](normed.index_select(0, end_rows))
                ends = ends.reshape(n_candidates, n_classes, n_heads, -1)
                name_query = ends.transpose(1, 2)
                n_queries = 1
                end_positions = name_positions.index_select(0, eot_index)
                name_mask = _mask(columns <= end_positions.reshape(-1, 1, 1))
            else:
                name_query = by_head(names_at, query_of)
            sos_key = self.sos_keys[layer].expand(n_candidates, -1, -1, -1)
            sos_value = self.sos_values[layer].expand(n_candidates, -1, -1, -1)
            # [P, h, 1 + m, d / h]
            prefix_key = torch.cat([sos_key, by_head(prefix_rows, key_of)], 2)
            prefix_value = torch.cat([sos_value, by_head(prefix_rows, value_of)], 2)
            # Names: [P, h, C * queries, d / h] before the prefix, and before each other
            # [P, h, C, queries, d / h], which is the same memory.
            scores = torch.cat(
                [
                    _by_class(
                        name_query @ prefix_key.transpose(-1, -2) * scale, n_classes, n_queries
                    ),
                    _by_class(name_query, n_classes, n_queries)
                    @ _by_class(name_key, n_classes, n_name).transpose(-1, -2)
                    * scale
                    + name_mask,
                ],
                -1,
            )
            weights = scores.softmax(-1)
            from_prefix = weights[..., : n_context + 1].flatten(2, 3) @ prefix_value
            from_name = weights[..., n_context + 1 :] @ _by_class(name_value, n_classes, n_name)
            attended = from_prefix + from_name.flatten(2, 3)  # [P, h, C * queries, d / h]
            if last:
                attended = attended.transpose(1, 2).reshape(-1, width)
            else:
                query = by_head(prefix_rows, query_of)
                weights = (query @ prefix_key.transpose(-1, -2) * scale + prefix_mask).softmax(-1)
                of_prefix = (weights @ prefix_value).transpose(1, 2).reshape(-1, width)
                of_names = attended.reshape(-1, width // n_heads).index_select(0, unpad_blocks)
                attended = torch.cat([of_prefix, of_names.reshape(-1, width)])
            rows = _after_attention(block, rows, block.attn.out_proj(attended))
        features = self.ln_final(rows)
        if isinstance(self.projection, nn.Module):
            features = self.projection(features)
        elif self.projection is not None:
            features = features @ self.projection
        features = functional.normalize(features, dim=-1)
        return features.reshape(n_candidates, n_classes, -1)


def _projection(block: Any, parts: str) -> nn.Linear:
    """Return the query, key and value projections named in `parts` (q, kv or qkv) as one layer."""
    attention = block.attn
    width = attention.embed_dim
    start, stop = {"q": (0, 1), "kv": (1, 3), "qkv": (0, 3)}[parts]
    part = slice(start * width, stop * width)
    layer = nn.Linear(width, (stop - start) * width, bias=attention.in_proj_bias is not None)
    with torch.no_grad():
        layer.weight.copy_(attention.in_proj_weight[part])
        if attention.in_proj_bias is not None:
            layer.bias.copy_(attention.in_proj_bias[part])
    return layer.requires_grad_(False)


def _by_class(grid: Tensor, n_classes: int, n_name: int) -> Tensor:
    return grid.unflatten(2, (n_classes, n_name))


def _after_attention(block: Any, rows: Tensor, attended: Tensor) -> Tensor:
    rows = rows + block.ls_1(attended)
    hidden: Tensor = rows + block.ls_2(block.mlp(block.ln_2(rows)))
    return hidden


def _mask(seen: Tensor) -> Tensor:
    return torch.where(seen, 0.0, _MASKED)


class SequenceGraph(nn.Module):
    """Contexts to text features through the model's own forward over whole sequences.

    `sequence_index` i64[C, L] selects rows of [contexts; name embeddings]; `tokens` i64[C, L] are
    the ids from which the tower computes masks, positions and pooling.
    """

    def __init__(self, model: Any, tower: TextTower) -> None:
        super().__init__()
        self.model = model
        self._tower = tower

    def forward(
        self, contexts: Tensor, name_embeddings: Tensor, sequence_index: Tensor, tokens: Tensor
    ) -> Tensor:
        n_candidates = contexts.shape[0]
        n_classes, length = tokens.shape
        shared = name_embeddings.expand(n_candidates, -1, -1)
        table = torch.cat([contexts, shared], 1)
        embedded = table.index_select(1, sequence_index.reshape(-1))
        embedded = embedded.reshape(n_candidates * n_classes, length, -1)
        ids = tokens.expand(n_candidates, -1, -1).reshape(n_candidates * n_classes, length)
        with self._tower.embedded(embedded):
            features: Tensor = self.model.encode_text(ids, normalize=True)
        return features.reshape(n_candidates, n_classes, -1)
