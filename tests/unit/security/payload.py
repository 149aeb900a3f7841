"""Files that write a canary when they are unpickled, or imported."""

import pickle
from pathlib import Path


class _Writes:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self._target = str(target)

    def __reduce__(self):
        return (Path.write_text, (Path(self._target), "a pickle was loaded"))


def pickled(target: Path) -> bytes:
    """A pickle that writes target when it is loaded."""
    return pickle.dumps(_Writes(target))


def module(target: Path) -> str:
    """Source that writes target when it is imported, and has what transformers would look for."""
    return (
        f"import pathlib\npathlib.Path({str(target)!r}).write_text('imported')\n"
        "from transformers import LlamaConfig as Own, LlamaForCausalLM as OwnModel\n"
        "from transformers import PreTrainedTokenizerFast as OwnTokenizer\n"
        "def generate(model, **kwargs): pass\n"
    )
