"""Configurations of real models, for runs with random weights."""

SHAPES = {
    "qwen2.5-3b": dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_theta=1e6, tie_word_embeddings=True, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1,
    ),
    "llama-3.1-8b": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=32768, rms_norm_eps=1e-5,
        rope_theta=5e5, tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1,
    ),
}  # fmt: skip
