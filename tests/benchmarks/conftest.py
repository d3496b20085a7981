from character_model import model, model_folder, tokenizer  # noqa: F401
