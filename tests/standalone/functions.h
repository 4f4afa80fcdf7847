// The functions of the kernels one by one, on the vectors of this instruction set.
#pragma once

namespace rnnkern {

// sigmoid, tanh and relu, the conversions of 16-bit types, and the mode in which denormal numbers
// are zero. Prints what it finds and adds to the counts.
void check_functions(int* passed, int* failed);

}  // namespace rnnkern
