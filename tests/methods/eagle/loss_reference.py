"""The loss of EAGLE heads written out in loops: one row, slot, step and head at a time."""

import math

import torch


def linear(p, name, x):
    return p[f"{name}.weight"] @ x


def normed(p, name, x, eps):
    return x / torch.sqrt((x * x).mean() + eps) * p[f"{name}.weight"]


def rotated(x, position, theta):
    """Turn the pairs (i, i + half) of a head by the angles of their position."""
    half = len(x) // 2
    first, second = [], []
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        cos, sin = math.cos(angle), math.sin(angle)
        first.append(x[i] * cos - x[i + half] * sin)
        second.append(x[i + half] * cos + x[i] * sin)
    return torch.stack(first + second)


def softmax(scores):
    largest = max(score.item() for score in scores)
    powers = [torch.exp(score - largest) for score in scores]
    return [power / sum(powers) for power in powers]


def attention(p, config, x, position, keys, values):
    """Return the output, and all keys and values with those of this slot, one list a kv head."""
    layer, size = "layers.0.self_attn", config.head_dim
    theta = config.rope_parameters["rope_theta"]

    def by_head(name):
        return linear(p, f"{layer}.{name}", x).view(-1, size)

    keys = [
        [*old, rotated(k, position, theta)] for old, k in zip(keys, by_head("k_proj"), strict=True)
    ]
    values = [[*old, v] for old, v in zip(values, by_head("v_proj"), strict=True)]
    group, joined = config.num_attention_heads // config.num_key_value_heads, []
    for head, query in enumerate(by_head("q_proj")):
        turned, mine = rotated(query, position, theta), head // group
        shares = softmax([turned @ key / math.sqrt(size) for key in keys[mine]])
        joined.append(sum(w * v for w, v in zip(shares, values[mine], strict=True)))
    return linear(p, f"{layer}.o_proj", torch.cat(joined)), keys, values


def run_slot(p, config, hidden, embedding, position, keys, values):
    """Run the one layer of heads at a slot."""
    eps = config.rms_norm_eps
    if config.kind == "eagle3":
        states = torch.cat(
            [
                normed(p, "layers.0.input_layernorm", embedding, eps),
                normed(p, "layers.0.hidden_norm", hidden, eps),
            ]
        )
    else:
        states = hidden = linear(p, "fc", torch.cat([embedding, hidden]))
    attended, keys, values = attention(p, config, states, position, keys, values)
    hidden = hidden + attended
    inner = normed(p, "layers.0.post_attention_layernorm", hidden, eps)
    gate, up = linear(p, "layers.0.mlp.gate_proj", inner), linear(p, "layers.0.mlp.up_proj", inner)
    return hidden + linear(p, "layers.0.mlp.down_proj", gate * gate.sigmoid() * up), keys, values


def run_row(p, config, features, embeddings, num_steps):
    """Return the output of every step at every slot of a row, ``outputs[t][k]``."""
    num_slots = len(features) - 1
    none = [[] for _ in range(config.num_key_value_heads)]
    keys, values, outputs, seen = none, none, [], []
    for t in range(num_slots):
        hidden = linear(p, "fc", features[t]) if config.kind == "eagle3" else features[t]
        out, keys, values = run_slot(p, config, hidden, embeddings[t + 1], t, keys, values)
        outputs.append([out])
        seen.append((keys, values))  # slots 0 to t, and nothing that comes later
    for t in range(num_slots):
        keys, values = seen[t]
        for k in range(1, min(num_steps, num_slots - t)):
            out, keys, values = run_slot(
                p, config, outputs[t][-1], embeddings[t + 1 + k], t + k, keys, values
            )
            outputs[t].append(out)
    return outputs


def smooth_l1(found, wanted):
    distance = (found - wanted).abs()
    return torch.where(distance < 1, distance * distance / 2, distance - 0.5).mean()


def reference(heads, base, rows, objective):
    """Return loss and ranks of rows ``(tokens, loss_mask)``, without padding or a batch.

    Returns:
        The loss, and ``ranks[row][t, k]``.
    """
    p, config = dict(heads.named_parameters()), heads.config
    columns = None if heads.draft_columns is None else heads.draft_columns.tolist()
    table, num_steps = base.get_input_embeddings().weight, objective.num_steps
    sums, counts, ranks = [0.0] * num_steps, [0] * num_steps, []
    for tokens, mask in rows:
        output = base(torch.tensor([tokens]), output_hidden_states=True)
        last, distributions = output.hidden_states[-1][0], output.logits[0]
        features = last
        if config.kind == "eagle3":
            read = [output.hidden_states[layer][0] for layer in config.feature_layers]
            features = torch.cat(read, dim=-1)
        outputs = run_row(p, config, features, table[torch.tensor(tokens)], num_steps)
        found = torch.full((len(tokens), num_steps), -1)
        for t, by_step in enumerate(outputs):
            for k, hidden in enumerate(by_step):
                target = t + 2 + k
                if target >= len(tokens) or not mask[target]:
                    continue
                if config.kind == "eagle3":
                    states = normed(p, "norm", hidden, config.rms_norm_eps)
                    logits = linear(p, "lm_head", states)
                else:
                    logits = base.get_output_embeddings().weight @ hidden
                distribution = distributions[target - 1]
                chosen = int(distribution.argmax())
                wanted = chosen if columns is None else index_of(columns, chosen)
                found[t, k] = rank(logits, wanted)
                if columns is not None and int(distribution.argmax()) not in columns:
                    continue
                distribution = torch.stack(
                    softmax(distribution if columns is None else distribution[columns])
                )
                cross = -(distribution * torch.log(torch.stack(softmax(logits)))).sum()
                loss = objective.distribution_weight * cross
                if objective.feature_weight:
                    loss = loss + objective.feature_weight * smooth_l1(hidden, last[target - 1])
                sums[k] = sums[k] + loss
                counts[k] += 1
        ranks.append(found)
    loss = sum(objective.decay**k * sums[k] / counts[k] for k in range(num_steps))
    return loss, ranks, counts


def index_of(columns, token):
    return columns.index(token) if token in columns else None


def rank(logits, wanted):
    if wanted is None:
        return len(logits)
    return sum(int(logit > logits[wanted]) for logit in logits)
