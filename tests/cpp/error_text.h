// The text of the exception that a call throws.
#pragma once

#include <string>

#include "core/error.h"

namespace zigzag::testing {

template <class Exception = Error, class Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const Exception& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace zigzag::testing
