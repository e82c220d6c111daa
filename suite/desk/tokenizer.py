"""The desk tokenizer: Qwen2's byte-level BPE with no merges, so one token per byte, and whole tokens for the marks that
graders look for.

It is a true Qwen2 tokenizer because transformers 5 loads every checkpoint of model type qwen2 with that class, whatever
the files say; a tokenizer of another kind would lose its spaces on the way, silently.
"""

PAD, EOS = "<pad>", "<eos>"
MARKS = ("<think>", "</think>", "\\boxed{")  # ordinary tokens: decoding with skip_special_tokens keeps them


def vocabulary() -> dict[str, int]:
    """Piece -> id: bytes first (the id of a byte is its value), then pad 256, eos 257, and the marks 258 to 260."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()  # byte -> the printable character that stands for it in byte-level BPE
    pieces = [*(alphabet[byte] for byte in range(256)), PAD, EOS, *MARKS]
    return {piece: index for index, piece in enumerate(pieces)}


def build_tokenizer():
    """A transformers Qwen2Tokenizer (`tokenizers` backend). It has no bos and adds nothing to a text: encode(text) is
    plain.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary(), merges=[], unk_token=PAD, pad_token=PAD, eos_token=EOS, model_max_length=2048,
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return tokenizer
