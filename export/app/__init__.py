"""What an Android app opens, and whether onnxruntime's Android package can run it."""
