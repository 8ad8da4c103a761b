"""SentencePiece models (`tokenizer.model`): Gemma, Llama 2, Mistral, the almanac's own."""

from __future__ import annotations

from collections.abc import Mapping

import sentencepiece

from pasta_jax.messages import message_of
from pasta_jax.tokens.base import SPACE, TextTokenizer
from pasta_jax.tokens.tokenizer import TokenizerError, of_library
from pasta_jax.tokens.usage import MARKER, Symbols

_FENCE = "\x02"
"""A character that no vocabulary merges with its neighbours. Text is encoded after it; then its ids are cut off,
and SentencePiece's dummy prefix with them."""


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece model, loaded from bytes; see `TextTokenizer`."""

    kind = "sentencepiece"

    def _open(self, added: Mapping[int, str]) -> Symbols:
        if not self.model:  # of which the processor makes an empty vocabulary, without a word
            raise TokenizerError("Not a SentencePiece model: the file is empty.")
        try:
            self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except Exception as error:
            raise TokenizerError(f"Not a SentencePiece model: {message_of(error)}") from error
        self._fence = of_library(sp.EncodeAsIds, _FENCE)
        spelled = [of_library(sp.IdToPiece, i) for i in range(sp.GetPieceSize())]
        if not any(spelled[i].strip(SPACE) for i in self._fence):  # at most the dummy prefix
            raise TokenizerError(
                "This tokenizer does not preserve text: it drops control characters. "
                "Train one with normalization_rule_name=identity."
            )
        special = {
            i
            for i, piece in enumerate(spelled)
            if sp.IsControl(i) or sp.IsUnknown(i) or MARKER.fullmatch(piece)
        }
        pieces = [b"" if i in special else self._piece_bytes(i, piece) for i, piece in enumerate(spelled)]
        names = {piece: i for i, piece in enumerate(spelled)}
        added = {i: name for i, name in added.items() if i >= len(pieces) and name not in names}
        names |= {name: i for i, name in added.items()}
        size = max(added, default=-1) + 1
        special |= {*range(len(pieces), size)}  # the processor does not know them, so text never becomes them
        pieces += [b""] * (size - len(pieces))
        bos, eos = (None if i < 0 else i for i in (sp.bos_id(), sp.eos_id()))
        pad = max(sp.pad_id(), 0)
        return Symbols(tuple(pieces), names, frozenset(special), bos=bos, eos=eos, pad=pad, added=added)

    def _piece_bytes(self, i: int, piece: str) -> bytes:
        return bytes([int(piece[3:5], 16)]) if self._sp.IsByte(i) else piece.replace(SPACE, " ").encode()

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = of_library(self._sp.EncodeAsIds, _FENCE + text)
        return ids[len(self._fence) :]
