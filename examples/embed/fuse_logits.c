/* One step of two members in C, from rows written out here: three tokens each, two anchors. */
#include <stdio.h>

#include "deepen.h"

static int failed(void) {
  fprintf(stderr, "%s\n", deepen_error());
  return 1;
}

int main(void) {
  /* Tokens 0 and 1 are the anchors themselves; token 2 lies between them. */
  const int32_t columns[] = {0, -1, 1, -1, 0, 1};
  const float values[] = {1.0f, 0.0f, 1.0f, 0.0f, 0.5f, 0.5f};
  const float rest[] = {0.0f, 0.0f, 0.0f};
  float main_logits[] = {1.0f, 0.9f, 0.0f}, assistant_logits[] = {0.0f, 4.0f, 0.0f};
  void* logits[] = {main_logits, assistant_logits};
  const deepen_dtype dtypes[] = {DEEPEN_F32, DEEPEN_F32};
  const float weights[] = {0.5f, 0.5f};
  deepen_settings settings = deepen_default_settings();
  const deepen_map* maps[2];
  deepen_map* map = NULL;
  deepen_fusion* fusion = NULL;
  int32_t chosen = -1;
  deepen_status status;

  if (deepen_interface_version() != DEEPEN_INTERFACE_VERSION) {
    fprintf(stderr, "the library is of another version than its header\n");
    return 1;
  }
  if (deepen_map_create(columns, values, rest, 3, 2, 2, &map) != DEEPEN_OK) return failed();
  maps[0] = maps[1] = map;
  settings.candidates = 3;
  status = deepen_fusion_create(maps, 2, &settings, &fusion);
  deepen_map_free(map); /* the fusion keeps what it needs */
  if (status != DEEPEN_OK) return failed();
  status = deepen_fusion_step(fusion, 1, logits, dtypes, weights, &chosen, NULL);
  deepen_fusion_free(fusion);
  if (status != DEEPEN_OK) return failed();
  printf("%d\n", chosen);
  return 0;
}
