"""Every field of transformers' generation config, with a value to try, and what drafting does with it."""

from transformers import CompileConfig, WatermarkingConfig

from helpers_tokenizers import LETTERS, letter_tokenizer

DRAFTED = "drafted"  # the text of plain decoding, by drafting
PLAIN_TEXT = "plain"  # by transformers' own loop, with a warning; refused by `custom_generate=tidar`
REFUSED = "refused"  # by transformers, or by us
SILENT = "unread"  # plain decoding reads it no more than drafting does

ENDS = {"eos_token_id": list(range(40, 50))}
# Field: a value, with what it needs beside it, and what drafting does with it.
FIELDS = {
    "max_length": ({"max_length": 15, "max_new_tokens": None}, DRAFTED),
    "max_new_tokens": ({"max_new_tokens": 7}, DRAFTED),
    "min_length": ({"min_length": 14, **ENDS}, DRAFTED),
    "min_new_tokens": ({"min_new_tokens": 9, **ENDS}, DRAFTED),
    "early_stopping": ({"early_stopping": True, "num_beams": 2}, PLAIN_TEXT),
    "max_time": ({"max_time": 1000.0}, DRAFTED),
    "stop_strings": ({"stop_strings": [LETTERS[46]], "tokenizer": letter_tokenizer(), "eos_token_id": 99}, DRAFTED),
    "do_sample": ({"do_sample": True, "top_k": 1}, DRAFTED),
    "num_beams": ({"num_beams": 2}, PLAIN_TEXT),
    "use_mtp": ({"use_mtp": True}, REFUSED),
    "use_cache": ({"use_cache": False}, PLAIN_TEXT),
    "cache_implementation": ({"cache_implementation": "static"}, DRAFTED),
    "cache_config": ({"cache_config": {"nbits": 4}}, SILENT),  # of quantized caches, which are a kind of their own
    "max_cache_len": ({"max_cache_len": 512, "cache_implementation": "static"}, DRAFTED),
    "temperature": ({"temperature": 0.7, "do_sample": True, "top_k": 1}, DRAFTED),
    "top_k": ({"top_k": 1, "do_sample": True}, DRAFTED),
    "top_p": ({"top_p": 1e-6, "do_sample": True}, DRAFTED),
    "min_p": ({"min_p": 1.0, "do_sample": True}, DRAFTED),
    "top_h": ({"top_h": 0.4, "top_k": 1, "do_sample": True}, DRAFTED),
    "typical_p": ({"typical_p": 0.4, "top_k": 1, "do_sample": True}, DRAFTED),
    "epsilon_cutoff": ({"epsilon_cutoff": 0.9, "top_k": 1, "do_sample": True}, DRAFTED),
    "eta_cutoff": ({"eta_cutoff": 0.9, "top_k": 1, "do_sample": True}, DRAFTED),
    "repetition_penalty": ({"repetition_penalty": 1.7}, DRAFTED),
    "encoder_repetition_penalty": ({"encoder_repetition_penalty": 1.7}, DRAFTED),
    "length_penalty": ({"length_penalty": 2.0, "num_beams": 2}, PLAIN_TEXT),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 1}, DRAFTED),
    "bad_words_ids": ({"bad_words_ids": [[n] for n in range(30)]}, DRAFTED),
    "renormalize_logits": ({"renormalize_logits": True}, DRAFTED),
    "forced_bos_token_id": ({"forced_bos_token_id": 9}, DRAFTED),
    "forced_eos_token_id": ({"forced_eos_token_id": 33}, DRAFTED),
    "remove_invalid_values": ({"remove_invalid_values": True}, DRAFTED),
    "exponential_decay_length_penalty": ({"exponential_decay_length_penalty": (2, 9.0), "eos_token_id": 33}, DRAFTED),
    "suppress_tokens": ({"suppress_tokens": list(range(30))}, DRAFTED),
    "begin_suppress_tokens": ({"begin_suppress_tokens": list(range(30))}, DRAFTED),
    "sequence_bias": ({"sequence_bias": [[[5], 9.0]]}, DRAFTED),
    "token_healing": ({"token_healing": True}, REFUSED),  # by transformers, without a tokenizer
    "guidance_scale": ({"guidance_scale": 1.5}, PLAIN_TEXT),
    "watermarking_config": ({"watermarking_config": WatermarkingConfig(bias=9.0)}, DRAFTED),
    "num_return_sequences": ({"num_return_sequences": 2, "do_sample": True, "top_k": 1}, DRAFTED),
    "output_attentions": ({"output_attentions": True}, PLAIN_TEXT),
    "output_hidden_states": ({"output_hidden_states": True}, PLAIN_TEXT),
    "output_scores": ({"output_scores": True}, DRAFTED),
    "output_logits": ({"output_logits": True}, DRAFTED),
    "return_dict_in_generate": ({"return_dict_in_generate": True}, DRAFTED),
    "pad_token_id": ({"pad_token_id": 7, **ENDS}, DRAFTED),
    "bos_token_id": ({"bos_token_id": 4}, SILENT),  # of prompts that are not there
    "eos_token_id": (ENDS, DRAFTED),
    "encoder_no_repeat_ngram_size": ({"encoder_no_repeat_ngram_size": 1}, DRAFTED),
    "decoder_start_token_id": ({"decoder_start_token_id": 4}, SILENT),
    "is_assistant": ({"is_assistant": True, "output_scores": True}, PLAIN_TEXT),
    "num_assistant_tokens": ({"num_assistant_tokens": 3}, SILENT),
    "num_assistant_tokens_schedule": ({"num_assistant_tokens_schedule": "constant"}, SILENT),
    "assistant_confidence_threshold": ({"assistant_confidence_threshold": 0.3}, SILENT),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 2}, PLAIN_TEXT),
    "max_matching_ngram_size": ({"max_matching_ngram_size": 2, "prompt_lookup_num_tokens": 2}, PLAIN_TEXT),
    "assistant_early_exit": ({"assistant_early_exit": 1}, PLAIN_TEXT),
    "assistant_lookbehind": ({"assistant_lookbehind": 3}, SILENT),
    "target_lookbehind": ({"target_lookbehind": 3}, SILENT),
    "assistant_ensemble_weight": ({"assistant_ensemble_weight": 0.3}, SILENT),
    "speculation_type": ({"speculation_type": "dflash"}, SILENT),  # without an assistant
    "compile_config": ({"compile_config": CompileConfig()}, DRAFTED),
    "disable_compile": ({"disable_compile": True}, DRAFTED),
    "continuous_batching_config": ({"continuous_batching_config": None}, SILENT),
    "low_memory": ({"low_memory": True}, SILENT),
    "penalty_alpha": ({"penalty_alpha": 0.5, "top_k": 4}, REFUSED),
    "dola_layers": ({"dola_layers": "low"}, REFUSED),
    "diversity_penalty": ({"diversity_penalty": 0.5, "num_beams": 2, "num_beam_groups": 2}, REFUSED),
    "num_beam_groups": ({"num_beam_groups": 2, "num_beams": 2}, REFUSED),
    "constraints": ({"constraints": [1]}, REFUSED),
    "force_words_ids": ({"force_words_ids": [[3]]}, REFUSED),
    "prefill_chunk_size": ({"prefill_chunk_size": 4}, DRAFTED),
}
NOT_OF_A_CALL = {"_from_model_config", "transformers_version"}
