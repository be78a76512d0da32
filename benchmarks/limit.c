/* The floor: what one request costs a client that does nothing but move the bytes.
 *
 * Thread per connection, keep-alive HTTP/1.1, no signature, no TLS. A thread takes the next number
 * of the plan from one shared counter. GET receives into one buffer per thread, as large as the
 * object and touched before the clock starts; LOAD is a GET into memory that is as large as all of
 * it and was touched before, each answer in a place of its own, as a checkpoint is loaded into a
 * model; PUT sends one buffer that all threads share, as a client does that is given the same payload
 * again and again. All memory starts on a page: 1-31 bytes into one, AMD's processors copy 3-4 times
 * slower.
 *
 * usage: limit get|load|put HOST PORT CONNECTIONS COUNT SIZE PATH
 *        a PATH with %u names COUNT objects; a PATH without is one object read in COUNT ranges
 * prints one JSON line: wall, user, sys (seconds), bytes, requests, peak (bytes of resident memory)
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_MAX = 8192 };

static const char *host, *path;
static int port, putting, loading;
static unsigned count;
static size_t size;
static unsigned next_number;
static char *payload, *memory;
static pthread_barrier_t ready, go, done;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int dial(void) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || inet_pton(AF_INET, host, &to.sin_addr) != 1) die("socket");
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0) die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static void send_all(int fd, char *head, size_t head_len, char *body, size_t body_len) {
    struct iovec iov[2] = {{head, head_len}, {body, body_len}};
    while (iov[0].iov_len || iov[1].iov_len) {
        ssize_t n = writev(fd, iov, 2);
        if (n <= 0) die("writev");
        for (int i = 0; i < 2 && n; i++) {
            size_t step = (size_t)n < iov[i].iov_len ? (size_t)n : iov[i].iov_len;
            iov[i].iov_base = (char *)iov[i].iov_base + step;
            iov[i].iov_len -= step;
            n -= (ssize_t)step;
        }
    }
}

/* Receive one answer into `buffer` of `room` bytes; returns the length of its body. With `into`, the
 * body goes there, but for what came with the head, which is copied. */
static size_t receive(int fd, char *buffer, size_t room, char *into) {
    size_t have = 0, limit = into ? size : room - HEAD_MAX;
    char *end = NULL;
    while (!end) {
        ssize_t n = recv(fd, buffer + have, room - have, 0);
        if (n <= 0) die("recv head");
        have += (size_t)n;
        end = memmem(buffer, have < HEAD_MAX ? have : HEAD_MAX, "\r\n\r\n", 4);
        if (!end && have >= HEAD_MAX) { fprintf(stderr, "head too long\n"); exit(1); }
    }
    if (strncmp(buffer, "HTTP/1.1 20", 11) != 0) {
        fprintf(stderr, "refused: %.*s\n", 60, buffer);
        exit(1);
    }
    size_t length = 0, head = (size_t)(end - buffer) + 4;
    for (char *line = buffer; line < end; line = memchr(line, '\n', (size_t)(end + 4 - line)), line++)
        if (strncasecmp(line, "content-length:", 15) == 0) length = strtoul(line + 15, NULL, 10);
    if (length > limit || have > head + length) { fprintf(stderr, "body too long: %zu\n", length); exit(1); }
    have -= head;
    if (into) memcpy(into, buffer + head, have);
    else into = buffer + head;
    while (have < length) {
        ssize_t n = recv(fd, into + have, length - have, MSG_WAITALL);
        if (n <= 0) die("recv body");
        have += (size_t)n;
    }
    return length;
}

static void *work(void *unused) {
    (void)unused;
    char head[1024], name[512];
    size_t room = HEAD_MAX + (putting || loading ? 0 : size);
    char *buffer = aligned_alloc(4096, (room + 4095) / 4096 * 4096);
    if (!buffer) die("malloc");
    memset(buffer, 'x', room);
    int fd = dial(), many = strchr(path, '%') != NULL;
    pthread_barrier_wait(&ready);
    pthread_barrier_wait(&go);
    for (;;) {
        unsigned i = __atomic_fetch_add(&next_number, 1, __ATOMIC_RELAXED);
        if (i >= count) break;
        snprintf(name, sizeof name, path, i);
        int n;
        if (putting)
            n = snprintf(head, sizeof head, "PUT %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Length: %zu\r\n\r\n", name, host, port, size);
        else if (many)
            n = snprintf(head, sizeof head, "GET %s HTTP/1.1\r\nHost: %s:%d\r\n\r\n", name, host, port);
        else
            n = snprintf(head, sizeof head, "GET %s HTTP/1.1\r\nHost: %s:%d\r\nRange: bytes=%zu-%zu\r\n\r\n", name, host, port,
                         (size_t)i * size, (size_t)(i + 1) * size - 1);
        send_all(fd, head, (size_t)n, payload, putting ? size : 0);
        size_t got = receive(fd, buffer, room, loading ? memory + (size_t)i * size : NULL);
        if (!putting && got != size) { fprintf(stderr, "%s: %zu bytes instead of %zu\n", name, got, size); exit(1); }
    }
    pthread_barrier_wait(&done);
    return NULL;
}

static double seconds(struct timeval t) { return (double)t.tv_sec + 1e-6 * (double)t.tv_usec; }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Highest resident memory in bytes; getrusage would count the process that started us as well. */
static long peak(void) {
    char line[256];
    long kib = 0;
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file)) sscanf(line, "VmHWM: %ld", &kib);
    if (file) fclose(file);
    return kib * 1024;
}

int main(int argc, char **argv) {
    if (argc != 8) { fprintf(stderr, "usage: limit get|load|put HOST PORT CONNECTIONS COUNT SIZE PATH\n"); return 2; }
    putting = strcmp(argv[1], "put") == 0;
    loading = strcmp(argv[1], "load") == 0;
    host = argv[2];
    port = atoi(argv[3]);
    unsigned connections = (unsigned)atoi(argv[4]);
    count = (unsigned)atoi(argv[5]);
    size = strtoul(argv[6], NULL, 10);
    path = argv[7];
    if (putting && !(payload = aligned_alloc(4096, (size + 4095) / 4096 * 4096))) die("malloc");
    if (putting) memset(payload, 'x', size);
    if (loading && !(memory = aligned_alloc(4096, (count * size + 4095) / 4096 * 4096))) die("malloc");
    if (loading) memset(memory, 'x', count * size);
    pthread_barrier_init(&ready, NULL, connections + 1);
    pthread_barrier_init(&go, NULL, connections + 1);
    pthread_barrier_init(&done, NULL, connections + 1);
    for (unsigned i = 0; i < connections; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL)) die("pthread_create");
        pthread_detach(thread);
    }
    struct rusage before, after;
    pthread_barrier_wait(&ready);
    getrusage(RUSAGE_SELF, &before);
    double start = now();
    pthread_barrier_wait(&go);
    pthread_barrier_wait(&done);
    double wall = now() - start;
    getrusage(RUSAGE_SELF, &after);
    printf("{\"wall\": %.6f, \"user\": %.6f, \"sys\": %.6f, \"bytes\": %zu, \"requests\": %u, \"peak\": %ld}\n", wall,
           seconds(after.ru_utime) - seconds(before.ru_utime), seconds(after.ru_stime) - seconds(before.ru_stime),
           (size_t)count * size, count, peak());
    return 0;
}
