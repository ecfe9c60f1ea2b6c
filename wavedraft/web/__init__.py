"""The page of `wavedraft web`: plain decoding and parallel decoding race on one prompt. It needs Gradio."""
