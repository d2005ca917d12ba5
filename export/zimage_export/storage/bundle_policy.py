"""How the weights of a bundle are stored, read from the bundle itself, so that programs can be built for it later."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from zimage_runtime.bundle.bundle import Bundle
from zimage_runtime.bundle.tensors import DType, TensorEntry, read_header

from .precision import BLOCK_SIZE, Encoding, StoragePolicy


@dataclass(frozen=True)
class BundlePolicy(StoragePolicy):
    """The policy that a bundle's weights were written with. What they lack is as the precision stores it today."""

    headers: Mapping[str, Mapping[str, TensorEntry]] = field(default_factory=dict)  # by component, then by name

    @classmethod
    def of(cls, bundle: Bundle) -> "BundlePolicy":
        """Reads the headers of a bundle's weights. Raises `TensorFileError`."""
        files = bundle.manifest.weights
        headers = {component: read_header(bundle.file(path)) for component, path in files.items()}
        return cls(bundle.manifest.precision, rotations=bundle.manifest.rotations, headers=headers)

    def encoding(self, component: str, name: str) -> Encoding:
        """How the weight of a linear layer is stored, by its name in the component."""
        entry = self.headers[component].get(name)
        match entry and entry.dtype:
            case None:
                return super().encoding(component, name)
            case DType.I8:
                return Encoding.INT8
            case DType.U8:
                assert entry is not None
                return Encoding.BLOCKS8 if entry.shape[-1] == BLOCK_SIZE else Encoding.BLOCKS4
        return Encoding.FLOAT

    def storage(self, component: str, name: str, shape: tuple[int, ...]) -> DType:
        """The stored type of a tensor that is not quantized, by its name in the component and its shape."""
        entry = self.headers[component].get(name)
        if entry is None or entry.dtype not in DType.__members__:
            return super().storage(component, name, shape)
        return DType(entry.dtype)
