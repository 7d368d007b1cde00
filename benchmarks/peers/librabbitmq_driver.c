/* librabbitmq in C: the practical limit. Compiled by benchmarks/environments.py.
 *
 *   librabbitmq_driver publish|one|consume PORT QUEUE SECONDS COUNT WINDOW PREFETCH BODY_BYTES
 *
 * publish: confirms on, WINDOW messages under way at most (one: a window of 1).
 * consume: PREFETCH, each delivery acked by itself.
 * The events are made once, without JSON: this is what the wire and the broker allow.
 */
#include <amqp.h>
#include <amqp_framing.h>
#include <amqp_tcp_socket.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

/* Never so many events in one sample. */
#define MOST 4000000

static amqp_connection_state_t connection;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static double cpu(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_utime.tv_usec / 1e6 + used.ru_stime.tv_sec +
           used.ru_stime.tv_usec / 1e6;
}

static void fail(const char *what)
{
    fprintf(stderr, "librabbitmq: %s\n", what);
    exit(1);
}

static void ready(void)
{
    char line[16];
    puts("{\"ready\": true}");
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin))
        exit(3);
}

static int by_size(const void *one, const void *other)
{
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static void figures(double begun, double cpu_begun, long count, double *latencies)
{
    double seconds = now() - begun;
    printf("{\"count\": %ld, \"seconds\": %.6f, \"rate\": %.3f, \"cpu_us\": %.4f", count, seconds,
           count / seconds, (cpu() - cpu_begun) / count * 1e6);
    if (latencies) {
        qsort(latencies, count, sizeof *latencies, by_size);
        printf(", \"p50\": %.2f, \"p99\": %.2f", latencies[(long)((count - 1) * 0.5)] * 1e6,
               latencies[(long)((count - 1) * 0.99)] * 1e6);
    }
    puts("}");
    fflush(stdout);
    _Exit(0);
}

/* Read one frame and return how many messages the broker has confirmed up to now. */
static uint64_t confirmed(void)
{
    amqp_frame_t frame;
    if (amqp_simple_wait_frame(connection, &frame) != AMQP_STATUS_OK)
        fail("connection lost");
    if (frame.frame_type != AMQP_FRAME_METHOD)
        fail("unexpected frame");
    if (frame.payload.method.id != AMQP_BASIC_ACK_METHOD)
        fail("not confirmed");
    amqp_basic_ack_t *ack = frame.payload.method.decoded;
    /* One tag, or all up to it that are not confirmed yet. */
    static unsigned char known[MOST + 1];
    static uint64_t lowest = 1, count;
    for (uint64_t tag = ack->multiple ? lowest : ack->delivery_tag; tag <= ack->delivery_tag; tag++)
        if (!known[tag]) {
            known[tag] = 1;
            count++;
        }
    if (ack->multiple)
        lowest = ack->delivery_tag + 1;
    amqp_maybe_release_buffers(connection);
    return count;
}

static void publish(double seconds, long window, long body_bytes, int one)
{
    char *body = malloc(body_bytes);
    memset(body, 'x', body_bytes);
    amqp_bytes_t bytes = {body_bytes, body};
    amqp_basic_properties_t properties = {0};
    properties._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_DELIVERY_MODE_FLAG;
    properties.content_type = amqp_cstring_bytes("application/json");
    properties.delivery_mode = 2;
    amqp_confirm_select(connection, 1);
    long sent = 0, done = 0, warm_up = window > 1 && body_bytes < 100000 ? 2000 : 20;
    double *latencies = one ? malloc(MOST * sizeof *latencies) : NULL;
    double begun = 0, cpu_begun = 0, end = 0;
    int over = 0;
    while (!over || done < sent) {
        while (!over && sent - done < window) {
            double at = now();
            if (sent == warm_up) {
                begun = at;
                cpu_begun = cpu();
                end = begun + seconds;
            }
            if ((end && at > end) || sent >= MOST) {
                over = 1;
                break;
            }
            if (amqp_basic_publish(connection, 1, amqp_cstring_bytes("domain-events"),
                                   amqp_cstring_bytes("bench.registered"), 0, 0, &properties,
                                   bytes) != AMQP_STATUS_OK)
                fail("publish failed");
            sent++;
            if (one) {
                done = confirmed();
                if (sent > warm_up)
                    latencies[sent - warm_up - 1] = now() - at;
            }
        }
        if (done < sent)
            done = confirmed();
    }
    figures(begun, cpu_begun, done - warm_up, latencies);
}

static void consume(const char *queue, double seconds, long wanted, int prefetch)
{
    if (prefetch)
        amqp_basic_qos(connection, 1, 0, prefetch, 0);
    ready();
    amqp_basic_consume(connection, 1, amqp_cstring_bytes(queue), amqp_empty_bytes, 0, 0, 0,
                       amqp_empty_table);
    if (amqp_get_rpc_reply(connection).reply_type != AMQP_RESPONSE_NORMAL)
        fail("cannot consume");
    double begun = 0, cpu_begun = 0;
    for (long count = 0;; count++) {
        amqp_envelope_t envelope;
        amqp_maybe_release_buffers(connection);
        if (amqp_consume_message(connection, &envelope, NULL, 0).reply_type != AMQP_RESPONSE_NORMAL)
            fail("connection lost");
        if (amqp_basic_ack(connection, 1, envelope.delivery_tag, 0) != AMQP_STATUS_OK)
            fail("ack failed");
        amqp_destroy_envelope(&envelope);
        if (count == 0) {
            begun = now();
            cpu_begun = cpu();
        } else if (count >= wanted - 1 || now() - begun > seconds) {
            figures(begun, cpu_begun, count, NULL);
        }
    }
}

int main(int argc, char **argv)
{
    if (argc != 9)
        fail("arguments");
    connection = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(connection);
    if (amqp_socket_open(socket, "127.0.0.1", atoi(argv[2])))
        fail("no broker");
    if (amqp_login(connection, "/", 0, 131072, 60, AMQP_SASL_METHOD_PLAIN, "guest", "guest")
            .reply_type != AMQP_RESPONSE_NORMAL)
        fail("login refused");
    amqp_channel_open(connection, 1);
    if (amqp_get_rpc_reply(connection).reply_type != AMQP_RESPONSE_NORMAL)
        fail("no channel");
    double seconds = atof(argv[4]);
    if (!strcmp(argv[1], "publish"))
        publish(seconds, atol(argv[6]), atol(argv[8]), 0);
    else if (!strcmp(argv[1], "one"))
        publish(seconds, 1, atol(argv[8]), 1);
    else if (!strcmp(argv[1], "consume"))
        consume(argv[3], seconds, atol(argv[5]), atoi(argv[7]));
    fail("unknown scenario");
}
