"""An engine behind OpenAI's API: `Service`, its ASGI app (`create_app`), and `Server`, which runs it. Needs the extra `serve`."""

try:
    from .app import create_app
    from .server import Server, bind
    from .service import Service
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    if package not in ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"):
        raise
    raise ModuleNotFoundError(f"the server needs {package}: pip install 'zigzag_ext[serve]'", name=error.name) from None

__all__ = ["Server", "Service", "bind", "create_app"]
