from megatron_moe_lpr.data.special_tokens import SpecialTokenSearch


def test_first_mention():
    search = SpecialTokenSearch({"<s>", "<|end|>", "<|end|>>", "[INST]"})
    assert search.first("a <|end|>> b <s>") == "<|end|>>"
    assert search.first("x[INST]") == "[INST]"
    assert search.first("<|other|> <sx") is None
    assert SpecialTokenSearch(()).first("<s>") is None
