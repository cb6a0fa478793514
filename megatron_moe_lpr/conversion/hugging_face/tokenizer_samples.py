"""Sample texts that tell similar tokenizers apart: scripts, digits, white space, special tokens."""

from megatron_moe_lpr.data.tokenizer import Tokenizer

TEXTS = (
    "Hello world",
    " a space before",
    "a space after ",
    "two  spaces and   three",
    "\ttab\tand\ttab",
    "line\nline\n\nparagraph\r\nend\n",
    "\n \n  \n",
    "1234567890 3.14159 1,000,000 2024-12-31",
    "x=1;y=22;z=333",
    "I'm, you're, WE'LL they'd",
    "CamelCase snake_case kebab-case",
    "def f(x):\n    return x ** 2  # square\n",
    "https://example.org/a?b=c&d=%20",
    "Γειά σου, κόσμε! Ελληνικά ΚΑΙ ΚΕΦΑΛΑΙΑ",
    "Árvíztűrő tükörfúrógép",
    "Türkçe: ığüşöç İSTANBUL",
    "Здравствуй, мир",
    "你好，世界。这是中文。",
    "日本語のテキスト、カタカナ",
    "안녕하세요 세계",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "नमस्ते दुनिया १२३",
    "สวัสดีชาวโลก",
    "Xin chào thế giới",
    "😀 👩‍👩‍👧 🇬🇷",
    "e\u0301 \ufb01 \u00bd \u2126",
    "\u2581 \u00a0 \u200b \u3000",
    "NUL \x00 and \ufffd",
    "a" * 40,
    "<0x0A> <unk> </s>",
    "!?...---***",
    "«quotes» “quotes” 'quotes'",
)
"""Normalised (NFC) and not, with characters of one to four bytes."""


def sample_texts(tokenizer: Tokenizer) -> list[str]:
    """Return `TEXTS`, and texts that contain special tokens of the tokenizer."""
    tokens = sorted(tokenizer.special_tokens)[:4]
    return [*TEXTS, *(text for token in tokens for text in (token, f"see {token} here", f"x{token}y"))]
