"""Convert a SentencePiece `.model` to a tokenizer of Hugging Face's `tokenizers` (tokenizer.json).

Follows `convert_slow_tokenizer.LlamaConverter` and `SpmConverter` of transformers 4, which the models' authors used.
transformers 5 omits the space that SentencePiece adds before a text, which changes ids.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_moe_lpr.data.tokenizer_settings import FLAGS, AddedToken
from megatron_moe_lpr.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
NEVER = -100.0
"""Score far below that of any text piece, so that byte and control pieces never match in a text."""


def convert_sentencepiece(model: bytes, added: Sequence[AddedToken], name: str) -> "Tokenizer":
    """Build the tokenizer. It does not add special tokens to texts.

    Args:
        model: content of the `.model` file.
        added: additional tokens from the files beside it.
        name: path of the `.model`, for error messages.

    Raises:
        UserError: the model type cannot be converted, or the id of an added token is taken.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    tokenizer = Tokenizer(_model(proto, name))
    if normalizer := _normalizer(proto.normalizer_spec, proto.trainer_spec):
        tokenizer.normalizer = normalizer
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    pieces = [
        AddedToken(number, piece.piece, special=piece.type != USER_DEFINED)
        for number, piece in enumerate(proto.pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    by_id = {token.id: token for token in (*pieces, *added)}
    add_tokens(tokenizer, [by_id[number] for number in sorted(by_id)], name)
    return tokenizer


def add_tokens(tokenizer: "Tokenizer", tokens: Sequence[AddedToken], name: str) -> None:
    """Add tokens at their ids. Raises UserError if one would get another id because the ids have a gap."""
    from tokenizers import AddedToken as RustToken

    for token in tokens:
        flags = {one: getattr(token, one) for one in FLAGS}
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([RustToken(token.content, **flags)])
        found = tokenizer.token_to_id(token.content)
        if found != token.id:
            raise UserError(
                f"{name}: the added token {token.content!r} has the id {token.id} in the files beside it and would get "
                f"{found}; copy the tokenizer's files again"
            )


def _model(proto: Any, name: str) -> Any:
    from tokenizers import models

    kind, fallback = proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback
    if kind == UNIGRAM:
        unknown = next((number for number, piece in enumerate(proto.pieces) if piece.type == UNKNOWN), None)
        lowest = min(piece.score for piece in proto.pieces) + NEVER
        scores = [(piece.piece, piece.score if _is_of_texts(piece) else lowest) for piece in proto.pieces]
        return models.Unigram(scores, unknown, fallback)
    if kind == BPE:
        vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        unknown = next((piece.piece for piece in proto.pieces if piece.type == UNKNOWN), None)
        merges = _merges(proto, vocabulary)
        return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    raise UserError(f"{name}: a SentencePiece model of words or characters has no form as tokenizer.json")


def _is_of_texts(piece: Any) -> bool:
    return piece.type in (NORMAL, USER_DEFINED)


def _merges(proto: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return all merges of two pieces into a third, by descending score, as SentencePiece applies them."""
    merges = []
    for piece in filter(_is_of_texts, proto.pieces):
        text = piece.piece
        cuts = [(text[:at], text[at:]) for at in range(1, len(text))]
        known = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
        known.sort(key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
        merges += [(piece.score, cut) for cut in known]
    merges.sort(key=lambda pair: -pair[0])  # stable sort: pieces of equal score keep their order in the vocabulary
    return [cut for _, cut in merges]


def _normalizer(spec: Any, trainer: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix and not trainer.treat_whitespace_as_suffix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps) if steps else None


def _decoder(spec: Any) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)
