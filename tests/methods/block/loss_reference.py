"""The loss of block heads written out in loops: one text, anchor and position at a time."""

import math

import torch

from tests.methods.block.block_heads import draft_by_loop


def markov_terms(heads, previous, hidden):
    """Return the term of the Markov head at each position of a block."""
    weights = dict(heads.markov_head.named_parameters())
    rank = heads.config.markov_rank
    state, terms = hidden.new_zeros(rank), []
    for token, vector in zip(previous, hidden, strict=True):
        code = weights["markov_w1.weight"][token]
        if heads.config.markov == "gated":
            gate = weights["gate_proj.weight"] @ torch.cat((vector, code))
            code = torch.sigmoid(gate + weights["gate_proj.bias"]) * code
        elif heads.config.markov == "rnn":
            joined = weights["joint_proj.weight"] @ torch.cat((state, code, vector))
            joined = joined + weights["joint_proj.bias"]
            gate = torch.sigmoid(joined[:rank])
            state = gate * state + (1 - gate) * torch.tanh(joined[rank : 2 * rank])
            code = torch.tanh(joined[2 * rank :])
        terms.append(weights["markov_w2.weight"] @ code)
    return terms


def reference(heads, base, rows, objective):
    """Return the loss, its sum at each position, the counts, and ranks by row and anchor."""
    config = heads.config
    columns = range(config.vocab_size) if heads.draft_columns is None else heads.draft_columns
    columns = [int(column) for column in columns]
    head = base.get_output_embeddings().weight
    own_head = head if heads.lm_head is None else heads.lm_head.weight
    embeddings = base.get_input_embeddings().weight
    sums, counts, ranks = [0.0] * config.num_drafts, [0] * config.num_drafts, {}
    for row, (tokens, mask) in enumerate(rows):
        output = base(torch.tensor([tokens]), output_hidden_states=True)
        read = torch.cat([output.hidden_states[i][0] for i in config.feature_layers], dim=-1)
        base_logits = output.logits[0]
        for anchor in range(1, len(tokens) - 1):
            if not (mask[anchor] and mask[anchor + 1]):
                continue
            ids = [tokens[anchor]] + [config.mask_token_id] * (config.block_size - 1)
            hidden = draft_by_loop(heads, read[:anchor], embeddings[ids], anchor)
            targets = []
            for token, counted in zip(tokens[anchor + 1 :], mask[anchor + 1 :], strict=True):
                if not counted or len(targets) == config.num_drafts:
                    break
                targets.append(token)
            previous = [tokens[anchor], *targets][: len(targets)]
            logits = hidden[: len(targets)] @ own_head.T
            if heads.markov_head is not None:
                logits = logits + torch.stack(markov_terms(heads, previous, hidden[: len(targets)]))
            for k, target in enumerate(targets):
                wanted = base_logits[anchor + k]
                loss, rank = _loss(heads, objective, logits[k], wanted, target, columns)
                if heads.confidence_head is not None and loss is not None:
                    code = heads.markov_head.markov_w1.weight[previous[k]]
                    shares = torch.minimum(logits[k].softmax(0), wanted[columns].softmax(0))
                    goal = shares.sum().item()
                    proj = heads.confidence_head.proj
                    seen = torch.cat((hidden[k], code)).detach()
                    guess = torch.sigmoid(proj.weight[0] @ seen + proj.bias[0])
                    loss = loss - objective.confidence_weight * (
                        goal * guess.log() + (1 - goal) * (1 - guess).log()
                    )
                if loss is not None:
                    sums[k] = sums[k] + loss
                    counts[k] += 1
                ranks.setdefault((row, anchor), []).append(rank)
    length = objective.decay_length
    weights = [1.0 if length is None else math.exp(-k / length) for k in range(len(sums))]
    total = sum(weight * part for weight, part in zip(weights, sums, strict=True))
    mean = total / sum(w * c for w, c in zip(weights, counts, strict=True))
    return mean, [float(torch.as_tensor(part).detach()) for part in sums], counts, ranks


def _loss(heads, objective, logits, wanted, target, columns):
    rank = len(columns)
    chosen = int(wanted.argmax())
    if chosen not in columns:
        return None, rank
    rank = int((logits > logits[columns.index(chosen)]).sum())
    drafted, base = logits.log_softmax(0), wanted[columns].log_softmax(0)
    loss = objective.distance_weight * (drafted.exp() - base.exp()).abs().sum()
    if target in columns:
        loss = loss - objective.token_weight * drafted[columns.index(target)]
    heat = objective.temperature
    soft = (wanted[columns] / heat).softmax(0) @ (logits / heat).log_softmax(0)
    return loss - objective.distribution_weight * heat**2 * soft, rank
