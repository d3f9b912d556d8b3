"""Text to token ids and back, for byte-level BPE.

In: tokenizer.json of a bundle or checkpoint. Out: ids of text, text of ids, whole or as a stream. Knows
which tokens are special from that file; knows nothing of prompts, roles or images.

The ids equal those of transformers' AutoTokenizer on the same folder with add_special_tokens=False. In a
byte-level vocabulary each token is a run of bytes, so a stream needs no look back: StreamDecoder feeds the
bytes of each token to an incremental UTF-8 decoder, constant work per token.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders

from autoglm_edge.errors import BundleError, PromptError

FILE_NAME = "tokenizer.json"


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable Latin-1 is itself, the rest follows U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_of_character()


class Tokenizer:
    """A byte-level BPE tokenizer.

    Attributes:
        vocab_size: one above the highest id, added tokens included; logits beyond have no token.
        special_ids: ids that `skip_special` drops. Added tokens that the file does not mark as special, as
            `<think>` and `<answer>`, are not among them.
    """

    vocab_size: int
    special_ids: frozenset[int]

    def __init__(self, backend: tokenizers.Tokenizer, where: str = FILE_NAME) -> None:
        """Wrap a loaded tokenizer; padding and truncation set in the file are switched off.

        Raises:
            BundleError: not byte-level, or empty.
        """
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise BundleError(
                f"{where} has the decoder {type(backend.decoder).__name__}, must be ByteLevel; "
                "it belongs to another model family"
            )
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._token_bytes: dict[int, bytes] = {}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise BundleError(f"{where} has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json of a folder.

        Raises:
            BundleError: missing, damaged, or not byte-level BPE.
        """
        file = Path(path) / FILE_NAME
        if not file.is_file():
            raise BundleError(f"{FILE_NAME} is not in {path}; export the checkpoint again")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{file} cannot be read ({error}); export the checkpoint again") from error
        return cls(backend, str(file))

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Special tokens written in it are recognised, none are added.

        Raises:
            PromptError: the text holds a lone surrogate, hence is not Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text holds the lone surrogate {text[error.start]!r} at character {error.start}; "
                "decode it as UTF-8 first"
            ) from error
        # The batch form lets other threads run meanwhile: half a second for a text of 240 kB.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD; ids without a token give nothing.

        Args:
            ids: token ids.
            skip_special: drop the tokens of `special_ids`.
        """
        return self._backend.decode([int(i) for i in ids if i >= 0], skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int | None:
        """The id of a token as written in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        """The token of an id as written in the vocabulary, or None."""
        return self._backend.id_to_token(int(token_id)) if token_id >= 0 else None

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; none if the id has no token.

        A token all of whose characters are in the byte alphabet means those bytes, any other (an added token
        in plain text) its own UTF-8. This is the rule of the ByteLevel decoder.
        """
        found = self._token_bytes.get(token_id)
        if found is None:
            token = self.token_of(token_id) or ""
            if all(character in _BYTES for character in token):
                found = bytes(_BYTES[character] for character in token)
            else:
                found = token.encode("utf-8")
            self._token_bytes[token_id] = found
        return found


class StreamDecoder:
    """Text of one answer, token by token.

    What `push` and `flush` return, joined, equals `Tokenizer.decode` of all ids. No return value ends within
    a character: bytes wait until the character is whole. Use one decoder per answer.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that becomes whole with this token; empty while a character is open."""
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.bytes_of(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character was cut short, else nothing. Starts over."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
