// Runs every test for every instruction set that this processor has.
#include <cstdio>

#include "check.h"
#include "cpu/simd/targets.h"

int main() {
  int passed = 0, failed = 0;
  for (const std::string& target : statsmerge::supported_targets()) {
    statsmerge::set_target(target);
    for (const NativeTest& test : native_tests()) {
      try {
        set_threads(1);
        test.run();
        ++passed;
      } catch (const std::exception& error) {
        std::printf("FAILED %s [%s]: %s\n", test.name, target.c_str(), error.what());
        ++failed;
      }
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
