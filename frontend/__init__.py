"""The frontend: public gRPC, the OpenAI HTTP shim, and everything about text. No torch."""
