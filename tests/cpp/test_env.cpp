// The parser of environment variables: what the table supports, and nothing else.
#include <doctest/doctest.h>

#include <cstdlib>

#include "core/env.h"
#include "core/error.h"

using namespace zigzag;

TEST_CASE("env: unset and empty mean the default, supported values are read") {
  for (const EnvVariable& variable : kEnvVariables) {
    unsetenv(variable.name);
    CHECK(env_text(variable.id) == "");
    setenv(variable.name, "", 1);
    CHECK(env_text(variable.id) == "");
    unsetenv(variable.name);
  }
  setenv("ZIGZAG_WARPS", "8", 1);
  CHECK(env_integer(Env::kWarps) == 8);
  setenv("ZIGZAG_CLUSTER", "16", 1);
  CHECK(env_integer(Env::kCluster) == 16);
  unsetenv("ZIGZAG_WARPS");
  unsetenv("ZIGZAG_CLUSTER");
  CHECK(env_integer(Env::kCluster) == 0);
}

TEST_CASE("env: any other value is an error that names the variable, the value and the supported ones") {
  const auto check = [](const char* name, Env variable, const char* value, const char* message) {
    setenv(name, value, 1);
    CHECK_THROWS_WITH_AS(env_text(variable), message, Error);
    unsetenv(name);
  };
  check("ZIGZAG_CLUSTER", Env::kCluster, "x", "ZIGZAG_CLUSTER is 'x'; supported: 0, 1, 2, 4, 8, 16");
  check("ZIGZAG_CLUSTER", Env::kCluster, "3", "ZIGZAG_CLUSTER is '3'; supported: 0, 1, 2, 4, 8, 16");
  check("ZIGZAG_CLUSTER", Env::kCluster, "1, 2", "ZIGZAG_CLUSTER is '1, 2'; supported: 0, 1, 2, 4, 8, 16");
  for (const char* value : {"-1", "9", "1.0", " 1", "99999999999999999999", "one"}) {
    check("ZIGZAG_WARPS", Env::kWarps, value, concat("ZIGZAG_WARPS is '", value, "'; supported: 0 to 8").c_str());
  }
  check("ZIGZAG_FORCE_PLAIN", Env::kForcePlain, "yes", "ZIGZAG_FORCE_PLAIN is 'yes'; supported: 0, 1");
}
