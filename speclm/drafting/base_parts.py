"""The parts of a base model that formats of heads embed, read without loading the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from speclm.errors import CheckpointError, UnknownNameError, shown
from speclm.files.hub import HubOptions, commit_of, download, is_hub_id, path_exists
from speclm.files.weights import WeightFiles, read_json, reading, weight_files
from speclm.target.loading import hub_commit
from speclm.target.logits import stored_matrices

# Ends of the keys of each matrix, over the families of Transformers.
_OUTPUTS = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight"),
    *("tok_embeddings.weight", "embeddings.weight"),
)
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
"""Files of a model next to its weights: its tokenizer, its code and its licence."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Names of the weights that Transformers reads."""

_NAMES = ("config.json", "generation_config.json", "*.safetensors.index.json")


@dataclass(frozen=True, slots=True, eq=False)
class BaseParts:
    """A base model, of which only what is asked for is read.

    Args:
        name: Folder or hub id, for commands and cards.
        config: Content of its config.json.
        folder: Folder of its files, as far as they were downloaded; None for a loaded model.
        commit: Commit on the hub, if it was downloaded.
        hub: Options for the hub.
        model: The loaded model, if there is one.
    """

    name: str
    config: Mapping[str, Any]
    folder: Path | None = None
    commit: str | None = None
    hub: HubOptions | None = None
    model: PreTrainedModel | None = None

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Self:
        """Return the parts of a loaded model."""
        name, config = model.config.name_or_path or "", model.config.to_dict()
        return cls(name, config, commit=hub_commit(model), model=model)

    @classmethod
    def find(cls, name: str | Path, hub: HubOptions | None = None) -> Self:
        """Return the parts of a model in a folder or on the hub; downloads its config and index.

        Raises:
            UnknownNameError: If there is no such folder or repository.
            CheckpointError: If there is no config, or it is damaged.
        """
        options = hub or HubOptions()
        if path_exists(name):
            folder = Path(name) / options.subfolder
        elif is_hub_id(str(name)):
            folder = download(str(name), options, _NAMES)
        else:
            raise UnknownNameError(
                f"base {str(name)!r} is no folder and no hub id such as 'org/name'; correct it"
            )
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path}: found no config, expected that of the base model; correct the path"
            )
        return cls(str(name), read_json(path), folder, commit_of(folder), options)

    @property
    def num_layers(self) -> int | None:
        """Decoder layers, if the config says so."""
        found = self._text_config.get("num_hidden_layers", self._text_config.get("n_layer"))
        return found if isinstance(found, int) else None

    @property
    def hidden_size(self) -> int | None:
        """Width of its hidden states, if the config says so."""
        found = self._text_config.get("hidden_size", self._text_config.get("n_embd"))
        return found if isinstance(found, int) else None

    @property
    def architectures(self) -> list[str]:
        """Names of its classes."""
        found = self.config.get("architectures")
        return [str(name) for name in found] if isinstance(found, list) else []

    @property
    def _text_config(self) -> Mapping[str, Any]:
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    def output_matrix(self) -> Float[Tensor, "vocab hidden"]:
        """Return the matrix that maps hidden states to logits; it stays on the disk until used.

        Raises:
            CheckpointError: If it is not found.
        """
        if self.model is not None:
            return self._stored("lm_weight")
        # Tied matrices are stored once, under the name of the embeddings.
        return self._matrix("output matrix", (*_OUTPUTS, *_EMBEDDINGS))

    def has_output_bias(self) -> bool:
        """Return whether the output matrix comes with a bias, which few families have."""
        if self.model is not None:
            head: object = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
            return getattr(head, "bias", None) is not None
        assert self.folder is not None
        ends = tuple(f".{end.removesuffix('weight')}bias" for end in _OUTPUTS)
        with reading(self.folder):
            return any(f".{key}".endswith(ends) for key in self._source().files)

    def whole(self) -> tuple[WeightFiles, list[Path]]:
        """Return the weights, and the small files next to them; downloads all of them.

        Raises:
            CheckpointError: If there are no safetensors, one is missing, or the model is loaded.
        """
        if self.folder is None:
            raise CheckpointError(
                f"the base {self.name!r} is loaded, expected its files, which are copied; name its "
                "folder or hub id, as with: speclm convert --base"
            )
        with reading(self.folder):
            source, folder = self._source(), self.folder
            names = sorted({file.name for file in source.files.values()})
            if self.hub is not None and not path_exists(self.name):
                folder = download(self.name, self.hub, (*names, *_SMALL))
            wrong = [
                n for n in names if not n.endswith(".safetensors") or not (folder / n).exists()
            ]
        if wrong:
            raise CheckpointError(
                f"{folder / wrong[0]}: the base's weights are missing or pickled, expected "
                "safetensors; save the base with its save_pretrained, and name that folder"
            )
        skipped = {"config.json", *(path.name for path in folder.glob("*.index.json"))}
        small = {path for pattern in _SMALL for path in folder.glob(pattern) if path.is_file()}
        return source, sorted(path for path in small if path.name not in skipped)

    def embeddings(self) -> Float[Tensor, "vocab hidden"]:
        """Return the embeddings; they stay on the disk until used.

        Raises:
            CheckpointError: If they are not found.
        """
        if self.model is not None:
            return self._stored("embeddings")
        return self._matrix("embeddings", _EMBEDDINGS)

    def _stored(self, part: str) -> Tensor:
        assert self.model is not None
        found = stored_matrices(self.model)[part]
        if found is None:
            raise CheckpointError(
                f"the base {self.name!r} has no {part} that can be copied, it is quantised or "
                "offloaded; load the base in full precision"
            )
        return found

    def _matrix(self, role: str, ends: tuple[str, ...]) -> Tensor:
        assert self.folder is not None
        with reading(self.folder):
            source = self._source()
            for end in ends:
                keys = [key for key in source.files if f".{key}".endswith(f".{end}")]
                if keys:
                    return self._load(source, min(keys, key=len), role)
        raise CheckpointError(
            f"{source.path}: found no {role} of the base among {len(source.files)} keys, expected "
            f"one that ends like {ends[0]!r}; name a folder of the whole model"
        )

    def _source(self) -> WeightFiles:
        assert self.folder is not None
        sources = list(weight_files(self.folder))
        # Others next to it are copies in another layout, such as consolidated.safetensors.
        own = (each for each in sources if each.path.name in _WEIGHTS)
        found = next(own, sources[0] if sources else None)
        if self.hub is not None and not path_exists(self.name):
            for pattern in ("model.safetensors", "*.safetensors"):  # a model without an index
                if found is None:
                    found = next(weight_files(download(self.name, self.hub, (pattern,))), None)
        if found is None:
            raise CheckpointError(
                f"{self.folder}: found no weights of the base, expected safetensors; name a folder "
                "of the whole model"
            )
        return found

    def _load(self, source: WeightFiles, key: str, role: str) -> Tensor:
        file = source.files[key]
        if not file.is_file() and self.hub is not None and not path_exists(self.name):
            download(self.name, self.hub, (file.name,))
        matrix = source.load([key])[key]
        width = self.hidden_size
        if matrix.ndim != 2 or width not in (None, matrix.shape[1]):
            raise CheckpointError(
                f"{file}: {shown(key)} has shape {list(matrix.shape)}, expected the {role} with "
                f"{width} columns as config.json says; name the folder of the base model"
            )
        return matrix
