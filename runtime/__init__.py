"""Tokens in, tokens out: the engine and its HTTP server. Others may import only `runtime.wire`."""
