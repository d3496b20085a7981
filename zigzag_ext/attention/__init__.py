"""The ops, their specification in torch, buffers that grow, routes of prompt chunks, and a module around them."""
