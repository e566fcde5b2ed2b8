"""Members that a server runs: llama.cpp's server, vLLM and others of OpenAI's style, SGLang."""
