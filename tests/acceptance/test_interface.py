import torch

from speclm.acceptance import AcceptanceRule, Accepted, Verified
from speclm.sampling import DraftSampling, TokenChooser
from speclm.tree.topology import chain


class OneToken(AcceptanceRule):
    """Accepts nothing and goes on with the target's likeliest token."""

    @property
    def name(self):
        return "one token"

    def accept(self, verified):
        tokens = verified.logits[:, 0].argmax(-1).tolist()
        rows = [[0] if is_live else [] for is_live in verified.is_live]
        emitted = [[t] if live else [] for t, live in zip(tokens, verified.is_live, strict=True)]
        return Accepted.from_host(rows, emitted, device=verified.logits.device)


def test_a_rule_of_ones_own_promises_nothing_and_asks_for_nothing_by_default():
    rule = OneToken()
    assert (rule.is_lossy, rule.uses_noise, rule.uses_draws) == (False, False, False)
    assert rule.draft_sampling is DraftSampling.NONE


def test_a_rule_decides_on_what_the_target_has_read():
    logits = torch.zeros(2, 3, 5)
    logits[0, 0, 4] = 1.0
    verified = Verified(
        tokens=torch.zeros(2, 3, dtype=torch.long),
        topology=chain(2),
        logits=logits,
        chooser=TokenChooser([], is_greedy=False),
        is_live=[True, False],
    )
    assert OneToken().accept(verified).emitted == [[4], []]
