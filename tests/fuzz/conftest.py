from character_model import one_thread  # noqa: F401
