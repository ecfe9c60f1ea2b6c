"""Language models that think ahead in parallel and still say exactly what they would have said."""
