"""What operations' C++ has in common: headers, and how Python calls what is compiled of them."""
