"""MTP as a method: how the layers are found next to the target's own."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from speclm.config import require_options
from speclm.errors import OptionError
from speclm.methods.registry import HeadsSource, Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from speclm.drafting.heads_folder import Destination
    from speclm.drafting.interface import Proposer


class MtpMethod(Method):
    """The multi-token prediction layers that come with the target's weights.

    Its options are the fields of `MtpProposerConfig`, `tree`, `dtype`, those of `HubOptions`, and
    `heads_path`, the folder or hub id of files with the layers, if the target's are elsewhere.
    """

    name = "mtp"
    summary = "the layers of the base's own checkpoint that were trained to predict further tokens"
    is_named = True
    reads_base_files = True

    @override
    def load(self, source: HeadsSource, target: "PreTrainedModel") -> "Proposer":
        from speclm.files.hub import HubOptions
        from speclm.files.weights import FLOATS, floating_dtype
        from speclm.methods.mtp.assembly import build_mtp
        from speclm.methods.mtp.checkpoint import fetch_mtp, read_mtp
        from speclm.methods.mtp.proposer import MtpProposer, MtpProposerConfig
        from speclm.target import TargetView
        from speclm.target.loading import hub_commit

        hub, options = HubOptions.split(source.options)
        known = {"dtype", "tree", "heads_path", *(f.name for f in fields(MtpProposerConfig))}
        require_options(options, known, owner="MTP layers")
        view, path = TargetView(target), options.pop("heads_path", None)
        if path is None:
            path = target.config.name_or_path
            if not path:
                raise OptionError(
                    "base is a loaded model that names no files, and heads 'mtp' are read from "
                    "those of the base; pass heads_kwargs={'heads_path': its folder or hub id}"
                )
            commit = hub_commit(target)
            if commit is not None and hub.revision is None:
                hub = HubOptions(**{**hub.given, "revision": commit})
        elif not isinstance(path, str):
            path = str(path)
        config = target.config.get_text_config()
        folder = fetch_mtp(path, hub, num_layers=view.num_layers)
        # That of a base in 8 bits is no dtype to compute with.
        usual = target.dtype if target.dtype in FLOATS else view.embedding_weight.dtype
        dtype = floating_dtype(options.pop("dtype", usual))
        heads = build_mtp(read_mtp(folder, config), view, dtype=dtype, device=view.device)
        return MtpProposer(heads, target=target, **options)

    @override
    def save(self, proposer: "Proposer", destination: "Destination") -> None:
        raise _not_saved()

    @override
    def checkpoint(self, proposer: "Proposer", destination: "Destination") -> Any:
        raise _not_saved()

    @override
    def owns(self, proposer: "Proposer") -> bool:
        from speclm.methods.mtp.proposer import MtpProposer

        return isinstance(proposer, MtpProposer)


def _not_saved() -> OptionError:
    return OptionError(
        "MTP layers are part of the base's own checkpoint and are not saved as heads; copy the "
        "files of the base, or name them with heads_path"
    )
